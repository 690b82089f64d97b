"""Where training pictures come from: a folder, a dataset, or generated scenes; each a numbered list of RGB images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.Image import fromarray as image_from_array

from dualstream.processing import load_image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
SCENES = "scenes"
SCENE_PIXELS = 96
ACCEPTED = (
    "a folder of images, a parquet file or a folder of them, the id of a dataset on the Hub, or "
    "scenes:SPLIT:N[:PIXELS], e.g. scenes:train:2000"
)


class ImageSource(ABC):
    """A numbered list of pictures that are opened one at a time.

    Attributes:
        name: what a person would call it.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pictures, readable or not."""

    @abstractmethod
    def __getitem__(self, index: int) -> Image:
        """Open a picture as RGB.

        Raises:
            ValueError: if it cannot be read.
        """

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Return what to call a picture in a message."""


class FolderImages(ImageSource):
    """The pictures of a folder and of those inside it, by path."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.folder = folder
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)

    def __len__(self) -> int:
        """See ``ImageSource``."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Image:
        """See ``ImageSource``."""
        return load_image(self.paths[index])

    def name_of(self, index: int) -> str:
        """See ``ImageSource``."""
        return str(self.paths[index].relative_to(self.folder))


class DatasetImages(ImageSource):
    """One image column of a ``datasets.Dataset``; the other columns are not read.

    Raises:
        ValueError: there is no such column, or several and none was chosen.
    """

    def __init__(self, dataset: Any, name: str, column: str | None = None) -> None:
        from datasets import Image as ImageFeature

        columns = [key for key, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
        if (column is None and len(columns) != 1) or (column is not None and column not in columns):
            raise ValueError(
                f"image_column={column!r} does not choose one image column of {name}; "
                f"its image columns are {columns}, all its columns {list(dataset.features)}."
            )
        self.name, self.column = name, column or columns[0]
        self.dataset = dataset.select_columns(self.column).cast_column(self.column, ImageFeature(decode=False))

    def __len__(self) -> int:
        """See ``ImageSource``."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image:
        """See ``ImageSource``."""
        cell = self.dataset[index][self.column]
        if cell is None:
            raise ValueError(f"{self.name_of(index)} is empty.")
        return load_image(cell["path"] if cell["bytes"] is None else cell["bytes"])

    def name_of(self, index: int) -> str:
        """See ``ImageSource``."""
        return f"row {index}"


class SceneImages(ImageSource):
    """Synthetic scenes, drawn when asked for."""

    def __init__(self, split: str, count: int, pixels: int = SCENE_PIXELS) -> None:
        from dualstream.data_builders.scenes.build import split_seeds

        self.name = f"{SCENES}:{split}:{count}:{pixels}"
        self.seeds, self.pixels = split_seeds(split, count), pixels

    def __len__(self) -> int:
        """See ``ImageSource``."""
        return len(self.seeds)

    def __getitem__(self, index: int) -> Image:
        """See ``ImageSource``."""
        from dualstream.data_builders.scenes import make_scene, rasterize

        return image_from_array(rasterize(make_scene(self.seeds[index]), self.pixels).image)

    def name_of(self, index: int) -> str:
        """See ``ImageSource``."""
        return f"scene {self.seeds[index]}"


def open_images(source: str, split: str = "train", column: str | None = None) -> ImageSource:
    """Open a source of pictures by its name.

    Args:
        source: a folder of images (searched to any depth); a parquet file, or a folder that holds parquet files; the
            id of a dataset on the Hub; or ``scenes:SPLIT:N[:PIXELS]``.
        split: split of a dataset.
        column: image column of a dataset; None: its only one.

    Returns:
        The source; nothing is decoded yet.

    Raises:
        ValueError: the name is none of these, or nothing is there.
    """
    if source.startswith(SCENES + ":"):
        return _open_scenes(source)
    path = Path(source).expanduser()
    if path.is_dir():
        opened = _open_folder(path, split, column)
    elif path.is_file() or source.count("/") == 1:
        opened = _open_dataset(source, split, column)
    else:
        raise ValueError(f"{source!r} is no source of images; accepted is {ACCEPTED}.")
    if len(opened) == 0:
        raise ValueError(f"{source!r} holds no images; accepted is {ACCEPTED}.")
    return opened


def _open_scenes(source: str) -> ImageSource:
    _, *parts = source.split(":")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts[1:]):
        raise ValueError(f"{source!r} names no scenes; accepted is scenes:SPLIT:N[:PIXELS], e.g. scenes:train:2000.")
    return SceneImages(parts[0], *map(int, parts[1:]))


def _open_folder(path: Path, split: str, column: str | None) -> ImageSource:
    if next(path.rglob("*.parquet"), None) is not None:
        return _open_dataset(str(path), split, column)
    return FolderImages(path)


def _open_dataset(source: str, split: str, column: str | None) -> ImageSource:
    from datasets import load_dataset

    if source.endswith(".parquet"):
        dataset = load_dataset("parquet", data_files=source, split="train")
    else:
        dataset = load_dataset(source, split=split)
    return DatasetImages(dataset, source, column)
