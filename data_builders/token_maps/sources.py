"""Where the pictures of a corpus come from: a folder, a dataset read as a stream, or generated scenes.

A source numbers its pictures in a fixed order and opens them one at a time, so that memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.Image import fromarray as image_from_array

from dualstream.processing import load_image

from .images import SUFFIXES, SourceItem

SCENES = "scenes:"
SCENE_PIXELS = 96
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
ACCEPTED = (
    "a folder of images, a parquet file, a folder or Hub id that `datasets` loads, or scenes:SPLIT:N[:PIXELS], "
    "e.g. scenes:test:5000"
)


class ImageSource(ABC):
    """Pictures in a fixed order.

    Attributes:
        name: what the card calls it; never a path of this machine.
        split: name of the split that the corpus gets.
        count: number of pictures, readable or not; None where only reading to the end can tell.
        license: identifier of the pictures' licence where it is known.
    """

    name: str
    split: str
    count: int | None = None
    license: str = "unknown"

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return JSON values that identify the pictures and their order."""

    @abstractmethod
    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """Yield the pictures from position `start` on, unopened."""


class FolderSource(ImageSource):
    """The image files of a folder and its sub-folders, sorted by path; hidden and linked folders are left out.

    Args:
        folder: the folder; its listing is read twice, once to count it and once to yield it.
        split: name of the split.
        limit: take the first pictures only.

    Raises:
        ValueError: if the folder holds no image file.
    """

    def __init__(self, folder: Path, split: str = "train", limit: int | None = None) -> None:
        self.folder, self.name, self.split, self.limit = folder, folder.resolve().name, split, limit
        self.count, digest = 0, hashlib.sha256()
        for path in islice(image_files(folder), limit):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n".encode())
            self.count += 1
        if self.count == 0:
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}); accepted is {ACCEPTED}.")
        self.listing = digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """See ``ImageSource``; `listing_sha256` covers relative paths and file sizes."""
        return {"kind": "folder", "name": self.name, "images": self.count, "listing_sha256": self.listing}

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """See ``ImageSource``."""
        for index, path in enumerate(islice(image_files(self.folder), start, self.limit), start):
            yield SourceItem(index, path.relative_to(self.folder).as_posix(), partial(_open_file, path))


class SceneSource(ImageSource):
    """Synthetic scenes, drawn when they are opened.

    Args:
        split: a split of the scenes; its seeds are shared with no other split.
        count: number of scenes.
        pixels: shorter side.
    """

    license = "apache-2.0"

    def __init__(self, split: str, count: int, pixels: int = SCENE_PIXELS) -> None:
        from dualstream.data_builders.scenes.scene import split_seeds

        self.seeds, self.pixels = split_seeds(split, count), pixels
        self.name, self.split, self.count = f"{SCENES}{split}:{count}:{pixels}", split, count

    def describe(self) -> dict[str, Any]:
        """See ``ImageSource``."""
        first = self.seeds[0] if len(self.seeds) else None
        return {"kind": "scenes", "name": self.name, "images": self.count, "first_seed": first}

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """See ``ImageSource``."""
        for index in range(start, len(self.seeds)):
            seed = self.seeds[index]
            yield SourceItem(index, f"{self.split}/{seed}", partial(_draw_scene, seed, self.pixels))


class DatasetSource(ImageSource):
    """One image column of a dataset, read as a stream; its length shows only at its end.

    Args:
        path: a parquet file, a folder that `load_dataset` takes, or a Hub id.
        split: split to read.
        image_column: default the only image column.
        id_column: column that names the pictures; default ``SPLIT/POSITION``.
        config: configuration (subset) of the dataset.
        revision: branch, tag or commit of a dataset on the Hub.
        limit: take the first pictures only.

    Raises:
        ValueError: if the dataset, split or column is not there.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_column: str | None = None,
        id_column: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
    ) -> None:
        import datasets

        self.split, self.limit, self.id_column = split, limit, id_column
        is_file = path.endswith(".parquet")
        self.name = Path(path).resolve().name if os.path.exists(path) else path
        options: dict[str, Any] = {"data_files": {split: path}} if is_file else {"name": config, "revision": revision}
        try:
            builder = datasets.load_dataset_builder("parquet" if is_file else path, **options)
            self.files = _data_files(builder, split, path)
            dataset = builder.as_streaming_dataset(split=split)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path!r} does not load as a dataset with a split {split!r}: {error}") from error
        dataset = dataset if dataset.features else dataset._resolve_features()
        self.column = _image_column(dataset.features or {}, image_column, self.name)
        if id_column is not None and id_column not in dataset.features:
            raise ValueError(f"id_column={id_column!r} is no column of {self.name}: {', '.join(dataset.features)}.")
        dataset = dataset.select_columns([self.column, *([id_column] if id_column else [])])
        self.dataset = dataset.cast_column(self.column, datasets.Image(decode=False))

    def describe(self) -> dict[str, Any]:
        """See ``ImageSource``; `files_sha256` covers relative names and sizes, or the commit of Hub files."""
        facts = {"kind": "dataset", "name": self.name, "split": self.split, "image_column": self.column}
        return {**facts, "id_column": self.id_column, "limit": self.limit, "files_sha256": self.files}

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """See ``ImageSource``."""
        rows: Iterable[dict[str, Any]] = self.dataset.skip(start) if start else self.dataset
        left = None if self.limit is None else max(self.limit - start, 0)
        for index, row in enumerate(islice(rows, left), start):
            name = f"{self.split}/{index}" if self.id_column is None else str(row[self.id_column])
            yield SourceItem(index, name, partial(_open_cell, row[self.column]))


def open_source(
    source: str,
    split: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> ImageSource:
    """Open a source of pictures by its name.

    Args:
        source: see ``ACCEPTED``. A folder that holds image files and no parquet file is a folder of images; any other
            folder is left to `datasets`.
        split: split of the dataset, and name of the corpus's split; default ``train``. Scenes state their own.
        image_column: image column of a dataset.
        id_column: column of a dataset that names its pictures.
        config: configuration (subset) of a dataset.
        revision: revision of a dataset on the Hub.
        limit: take the first pictures only.

    Returns:
        The source; no picture is opened yet.

    Raises:
        ValueError: if the name is none of these, an option does not go with it, or nothing is there.
    """
    if split is not None and not SPLIT_NAME.fullmatch(split):
        raise ValueError(f"split must be a plain name such as train, got {split!r}; use a limit to take a part.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    columns = {"image_column": image_column, "id_column": id_column, "config": config, "revision": revision}
    if source.startswith(SCENES):
        _refuse({"split": split, "limit": limit, **columns}, source, "scenes state their split and number themselves")
        return _scene_source(source)
    path = Path(source).expanduser()
    if path.is_dir() and not _holds_parquet(path) and next(image_files(path), None) is not None:
        _refuse(columns, source, "a folder of images has no columns or revisions")
        return FolderSource(path, split or "train", limit)
    if path.exists() or (source.count("/") == 1 and not source.startswith((".", "/", "~"))):
        name = str(path) if path.exists() else source
        return DatasetSource(name, split or "train", limit=limit, **columns)
    raise ValueError(f"images={source!r} is no source of pictures; accepted is {ACCEPTED}.")


def image_files(folder: Path) -> Iterator[Path]:
    """Yield the image files under a folder, sorted by the parts of their paths; holds one listing at a time."""
    with os.scandir(folder) as listing:
        entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from image_files(Path(entry.path))
        elif Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            yield Path(entry.path)


def _holds_parquet(folder: Path) -> bool:
    return next(folder.rglob("*.parquet"), None) is not None


def _refuse(options: dict[str, Any], source: str, reason: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be given for {source!r}: {reason}.")


def _scene_source(source: str) -> SceneSource:
    split, *numbers = source.removeprefix(SCENES).split(":")
    if len(numbers) not in (1, 2) or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"{source!r} names no scenes; accepted is scenes:SPLIT:N[:PIXELS], e.g. scenes:test:5000.")
    return SceneSource(split, *map(int, numbers))


def _image_column(features: Any, wanted: str | None, name: str) -> str:
    """Return the image column: the wanted one, else the only one there is."""
    from datasets import Image as ImageFeature

    images = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    if wanted in images or (wanted is None and len(images) == 1):
        return wanted or images[0]
    raise ValueError(
        f"image_column={wanted!r} does not choose one image column of {name}: its image columns are "
        f"{images or 'none'}, all its columns {list(features)}."
    )


def _data_files(builder: Any, split: str, path: str) -> str:
    """Hash what identifies the data files of a split: the commit on the Hub, else relative names and sizes."""
    files = builder.config.data_files
    if not files or split not in files:
        raise ValueError(f"its splits are {', '.join(map(str, files or {})) or 'none'}.")
    digest, root = hashlib.sha256(), Path(path).resolve()
    for file in files[split]:
        local = Path(file)
        label = f"{os.path.relpath(local, root)}\0{local.stat().st_size}" if local.is_file() else file
        digest.update(f"{label}\n".encode())
    return digest.hexdigest()


def _open_file(path: Path) -> Image:
    return load_image(path.read_bytes())  # from bytes, so that no error message holds a path of this machine


def _draw_scene(seed: int, pixels: int) -> Image:
    from dualstream.data_builders.scenes import make_scene, rasterize

    return image_from_array(rasterize(make_scene(seed), pixels).image)


def _open_cell(cell: dict[str, Any] | None) -> Image:
    """Open a cell of an image column that was not decoded: bytes, or the path or address of a file."""
    if cell is None:
        raise ValueError("the cell is empty; give a row with an image.")
    if cell["bytes"] is not None:
        return load_image(cell["bytes"])
    import fsspec

    with fsspec.open(cell["path"], "rb") as file:
        return load_image(file.read())
