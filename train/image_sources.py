"""Pictures to train on, by number: the sources of ``data_builders.token_maps``, opened in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from PIL.Image import Image

from dualstream.data_builders.token_maps.images import SourceItem
from dualstream.data_builders.token_maps.sources import DatasetSource, open_source
from dualstream.processing import load_image


class NumberedImages(ABC):
    """A list of pictures that are opened one at a time.

    Attributes:
        name: what the card calls it; never a path of this machine.
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


class ListedImages(NumberedImages):
    """The pictures of a source that can list them without opening them: files and generated scenes."""

    def __init__(self, name: str, items: list[SourceItem]) -> None:
        self.name, self.items = name, items

    def __len__(self) -> int:
        """See ``NumberedImages``."""
        return len(self.items)

    def __getitem__(self, index: int) -> Image:
        """See ``NumberedImages``."""
        return self.items[index].load()

    def name_of(self, index: int) -> str:
        """See ``NumberedImages``."""
        return self.items[index].source_id


class DatasetImages(NumberedImages):
    """One image column of a dataset, read by row number, where ``DatasetSource`` reads it as a stream."""

    def __init__(self, path: str, split: str, source: DatasetSource) -> None:
        from datasets import Image as ImageFeature
        from datasets import load_dataset

        if path.endswith(".parquet"):
            dataset: Any = load_dataset("parquet", data_files=path, split="train")
        else:
            dataset = load_dataset(path, split=split)
        self.name, self.column = source.name, source.column
        self.dataset = dataset.select_columns(self.column).cast_column(self.column, ImageFeature(decode=False))

    def __len__(self) -> int:
        """See ``NumberedImages``."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image:
        """See ``NumberedImages``."""
        cell = self.dataset[index][self.column]
        if cell is None:
            raise ValueError(f"{self.name_of(index)} of {self.name} is empty; give a row with an image.")
        return load_image(cell["path"] if cell["bytes"] is None else cell["bytes"])

    def name_of(self, index: int) -> str:
        """See ``NumberedImages``."""
        return f"row {index}"


def open_images(source: str, split: str = "train", column: str | None = None) -> NumberedImages:
    """Open pictures by the name of their source.

    Args:
        source: a folder of images, a parquet file, a folder or Hub id that `datasets` loads, or
            ``scenes:SPLIT:N[:PIXELS]``; see ``data_builders.token_maps.sources.open_source``.
        split: split of a dataset.
        column: image column of a dataset; None: its only one.

    Returns:
        The pictures; none is opened yet.

    Raises:
        ValueError: the name is none of these, or nothing is there.
    """
    is_scenes = source.startswith("scenes:")
    opened = open_source(source, None if is_scenes else split, column)
    if isinstance(opened, DatasetSource):
        path = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source
        return DatasetImages(path, split, opened)
    return ListedImages(opened.name, list(opened.items()))
