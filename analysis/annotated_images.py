"""Pictures with the objects that are in them, from generated scenes, annotation files or a plain folder.

Splits. Scenes have their own. The pictures of an annotation file are dealt to ``train``, ``validation`` and ``test``
by a hash of their name and the seed (25, 25 and 50 of 100), so that a choice made on one split is never reported on
the pictures it was made on; ``all`` takes every picture. A plain folder has no objects, hence nothing to choose, and
is always taken whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dualstream.data_builders.scenes import Raster, Scene, make_scene, rasterize
from dualstream.data_builders.scenes.scene import split_seeds
from dualstream.data_builders.token_maps.sources import FolderSource

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
SPLITS = ("train", "validation", "test", "all")
SHARES = {"train": 0.25, "validation": 0.25, "test": 0.5}
SCENE_PIXELS, SCENE_COUNT = 96, 200
SCENES_PER_SEED = 100_000  # scenes between the first scenes of two seeds
ACCEPTED = (
    "scenes, scenes:SPLIT[:N[:PIXELS]], coco:ANNOTATIONS.json:IMAGE_FOLDER, gqa:SCENE_GRAPHS.json:IMAGE_FOLDER, "
    "whatsup_b:FOLDER, or a folder of images"
)


@dataclass(frozen=True)
class AnnotatedObject:
    """One object of a picture.

    Attributes:
        name: what it is, lower case; other objects of the picture may have the same name.
        box: x1, y1, x2, y2 in pixels of the original image, within it and with an area.
        attributes: words for what it is like.
        is_crowd: whether the annotation stands for many objects at once.
        read_mask: gives the mask, or None where there is none.
        polygons: outlines x, y, x, y, ... in pixels, as the annotation file states them; empty where it states none.
        area: square pixels, as the annotation file states them; None where nobody does.
    """

    name: str
    box: Box
    attributes: tuple[str, ...] = ()
    is_crowd: bool = False
    read_mask: Callable[[], np.ndarray] | None = field(default=None, repr=False, compare=False)
    polygons: tuple[tuple[float, ...], ...] = ()
    area: float | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """(H, W) bool over the original image, read when asked for; None if there is none."""
        return None if self.read_mask is None else self.read_mask()


@dataclass(frozen=True)
class AnnotatedImage:
    """A picture that is opened when it is asked for.

    Attributes:
        name: its name in the source, unique there; never a path of this machine.
        objects: what is in it, in the order of the source.
        open_image: opens it.
        size: (width, height) as the annotation states it, None where nobody does.
        scene: the scene it was drawn from.
    """

    name: str
    objects: tuple[AnnotatedObject, ...]
    open_image: Callable[[], Image] = field(repr=False, compare=False)
    size: tuple[int, int] | None = None
    scene: Scene | None = field(default=None, repr=False)

    def image(self) -> Image:
        """Open the picture as RGB.

        Raises:
            ValueError: it cannot be read, or its size is not the annotated one.
        """
        image = self.open_image()
        if self.size is not None and image.size != self.size:
            raise ValueError(
                f"picture {self.name!r} is {image.width} x {image.height} pixels; its annotation says "
                f"{self.size[0]} x {self.size[1]}. Give the pictures that were annotated."
            )
        return image


def open_annotated(
    source: str | Path, limit: int | None = None, split: str = "test", seed: int = 0
) -> Sequence[AnnotatedImage]:
    """Open a source of pictures; no picture is read yet.

    Args:
        source: see ``ACCEPTED``. A split that the source names takes precedence.
        limit: most pictures; None: all, and 200 of generated scenes. Pictures of annotation files come in an order
            drawn by the seed, scenes by number (the first scene depends on the seed), those of a folder by name.
        split: ``train``, ``validation``, ``test`` or ``all`` (not for scenes).
        seed: of splits and order.

    Raises:
        ValueError: the source is none of these, a file is broken, or there is no picture.
    """
    source = str(source)
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; accepted are {', '.join(SPLITS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    kind, _, rest = source.partition(":")
    if kind == "scenes":
        return _open_scenes(rest, limit, split, seed)
    if kind in ("coco", "gqa", "whatsup_b") and rest:
        from .annotation_files import READERS

        found = READERS[kind](rest)
        return _chosen(found, limit, split, seed, source)
    if Path(source).expanduser().is_dir():
        return _open_folder(Path(source).expanduser(), limit)
    raise ValueError(f"data={source!r} is no source of pictures; accepted is {ACCEPTED}.")


def split_of(name: str, seed: int = 0) -> str:
    """The split that a picture of an annotation file belongs to."""
    ends = np.cumsum(list(SHARES.values()))
    return list(SHARES)[int(np.searchsorted(ends, _draw(f"split-{seed}-{name}"), side="right"))]


def clipped_box(box: Sequence[float], size: tuple[int, int]) -> Box | None:
    """The part of x1, y1, x2, y2 within a picture of (width, height); None if it has no area."""
    width, height = size
    x1, x2 = (min(max(float(value), 0.0), float(width)) for value in (box[0], box[2]))
    y1, y2 = (min(max(float(value), 0.0), float(height)) for value in (box[1], box[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _chosen(
    images: list[AnnotatedImage], limit: int | None, split: str, seed: int, source: str
) -> list[AnnotatedImage]:
    mine = [image for image in images if split == "all" or split_of(image.name, seed) == split]
    if not mine:
        raise ValueError(
            f"split={split!r} of {source!r} is empty ({len(images)} pictures in all); split='all' takes every one."
        )
    return sorted(mine, key=lambda image: (_draw(f"order-{seed}-{image.name}"), image.name))[:limit]


def _draw(text: str) -> float:
    """A number in [0, 1) that depends on a text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def _open_folder(folder: Path, limit: int | None) -> list[AnnotatedImage]:
    source = FolderSource(folder, limit=limit)
    return [AnnotatedImage(item.source_id, (), item.load) for item in source.items()]


def _open_scenes(rest: str, limit: int | None, split: str, seed: int) -> Sequence[AnnotatedImage]:
    named, *numbers = rest.split(":") if rest else [split]
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"'scenes:{rest}' names no scenes; accepted is scenes:SPLIT[:N[:PIXELS]].")
    count = int(numbers[0]) if numbers else limit or SCENE_COUNT
    pixels = int(numbers[1]) if len(numbers) > 1 else SCENE_PIXELS
    seeds = split_seeds(named, min(count, limit or count), start=SCENES_PER_SEED * seed)
    return _Scenes(named, seeds, pixels)


class _Scenes(Sequence[AnnotatedImage]):
    """Scenes that are drawn when they are asked for."""

    def __init__(self, split: str, seeds: Sequence[int], pixels: int) -> None:
        self.split, self.seeds, self.pixels = split, seeds, pixels

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> AnnotatedImage: ...
    @overload
    def __getitem__(self, index: slice) -> _Scenes: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Scenes(self.split, self.seeds[index], self.pixels)
        return annotated_scene(make_scene(self.seeds[index]), f"{self.split}/{self.seeds[index]}", self.pixels)


def annotated_scene(scene: Scene, name: str, pixels: int = SCENE_PIXELS) -> AnnotatedImage:
    """A scene as an annotated picture: objects are named by their shape, colour and texture are attributes.

    Args:
        scene: what to draw.
        name: of the picture.
        pixels: its shorter side.
    """
    raster = _raster(scene, pixels)
    objects = tuple(
        AnnotatedObject(
            item.shape,
            tuple(map(float, box)),  # type: ignore[arg-type]
            (item.color, item.texture),
            read_mask=partial(_scene_mask, scene, pixels, number),
        )
        for number, (item, box) in enumerate(zip(scene.objects, raster.boxes, strict=True))
        if raster.masks[number].any()
    )
    height, width = raster.image.shape[:2]
    return AnnotatedImage(name, objects, partial(_scene_image, scene, pixels), (width, height), scene)


@lru_cache(maxsize=8)
def _raster(scene: Scene, pixels: int) -> Raster:
    return rasterize(scene, pixels)


def _scene_mask(scene: Scene, pixels: int, number: int) -> np.ndarray:
    return _raster(scene, pixels).masks[number].copy()


def _scene_image(scene: Scene, pixels: int) -> Image:
    from PIL.Image import fromarray

    return fromarray(_raster(scene, pixels).image)
