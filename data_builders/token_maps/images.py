"""One picture of a source: where it stands, how to open it, and the hash that says which pixels it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class SourceItem:
    """A picture that was not opened yet.

    Attributes:
        index: position in the source, from 0; a picture that cannot be read keeps its position.
        source_id: its name in the source.
        load: returns the picture as 8-bit RGB, or raises ValueError or OSError.
    """

    index: int
    source_id: str
    load: Callable[[], Image]


@dataclass(frozen=True)
class ImageFacts:
    """What the corpus says of a picture besides its readings.

    Attributes:
        index: position in the source.
        source_id: its name in the source.
        image_hash: see ``image_hash``.
        size: (width, height) in pixels.
    """

    index: int
    source_id: str
    image_hash: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Reject:
    """A picture that could not be read.

    Attributes:
        index: position in the source.
        source_id: its name in the source.
        reason: the message of the error.
    """

    index: int
    source_id: str
    reason: str


@dataclass(frozen=True)
class Opened:
    """An opened picture: its pixels and facts."""

    image: Image
    facts: ImageFacts


def open_item(item: SourceItem, hashed: bool = True) -> Opened | Reject:
    """Open a picture and hash its pixels; a picture that cannot be read becomes a ``Reject``.

    Args:
        item: the picture.
        hashed: False leaves the hash empty, to measure what it costs.
    """
    try:
        image = item.load()
    except (ValueError, OSError) as error:
        return Reject(item.index, item.source_id, str(error) or type(error).__name__)
    facts = ImageFacts(item.index, item.source_id, image_hash(image) if hashed else "", image.size)
    return Opened(image, facts)


def image_hash(image: Image) -> str:
    """SHA-256 (hex) over ``WIDTHxHEIGHT:`` in ASCII and the values of an 8-bit RGB picture, row by row."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
