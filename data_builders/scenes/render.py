"""Scenes to pixels: picture, visible-pixel masks and tight boxes from one geometry, at any size."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scene import COLORS, Background, Clutter, Scene, SceneObject

SUPERSAMPLE = 3  # sub-pixels per pixel and axis
SHADE = 0.35  # brightness of the second colour of a texture, relative to the object's colour
Array = np.ndarray


@dataclass(frozen=True)
class Raster:
    """A rendered scene.

    Attributes:
        image: (H, W, 3) uint8.
        masks: (n_objects, H, W) bool, the pixels of which an object covers at least half and nothing hides.
        boxes: (n_objects, 4) int64, the extents of the masks as left, top, right, bottom in pixels; right and bottom
            are exclusive. All zero for an object without a visible pixel.
        clutter: (H, W) float32 in [0, 1], the part of every pixel that visible clutter covers.
    """

    image: Array
    masks: Array
    boxes: Array
    clutter: Array


def rasterize(scene: Scene, size: int = 96) -> Raster:
    """Draw a scene with its shorter side `size` pixels long.

    Raises:
        ValueError: If `size` is below 8 pixels.
    """
    if size < 8:
        raise ValueError(f"size is {size}; accepted are 8 pixels or more for the shorter side.")
    width, height = round(scene.width * size), round(scene.height * size)
    image = _backdrop(scene.background, width, height, size)
    clutter = np.zeros((height, width), np.float32)
    for speck in scene.clutter:
        window, x, y = _window(*_clutter_box(speck), width, height, size)
        if x.size and y.size:
            cover = _mean(_in_capsule(speck, x, y))
            image[window] += cover[..., None] * (np.asarray(speck.rgb, np.float32) - image[window])
            clutter[window] = np.maximum(clutter[window], cover)
    masks = np.zeros((len(scene.objects), height, width), bool)
    for index, item in enumerate(scene.objects):
        window, x, y = _window(
            item.x - item.radius, item.y - item.radius, item.x + item.radius, item.y + item.radius, width, height, size
        )
        cover = _paint(image[window], item, (x - item.x) / item.radius, (y - item.y) / item.radius)
        clutter[window] *= 1 - cover
        masks[(slice(0, index), *window)] &= cover < 0.5
        masks[(index, *window)] = cover >= 0.5
    boxes = np.asarray([_extent(mask) for mask in masks], np.int64).reshape(-1, 4)
    return Raster((image + 0.5).astype(np.uint8), masks, boxes, clutter)


def render(scene: Scene, size: int = 96) -> Image.Image:
    """The picture alone, as an RGB image whose shorter side has `size` pixels."""
    return Image.fromarray(rasterize(scene, size).image)


def _extent(mask: Array) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _window(
    left: float, top: float, right: float, bottom: float, width: int, height: int, size: int
) -> tuple[tuple[slice, slice], Array, Array]:
    """The pixel window of a region and the canvas coordinates of its sub-pixels, x (1, w) and y (h, 1)."""
    x0, y0 = max(0, int(left * size)), max(0, int(top * size))
    x1, y1 = max(x0, min(width, int(right * size) + 1)), max(y0, min(height, int(bottom * size) + 1))
    step = SUPERSAMPLE * size
    x = (np.arange(x0 * SUPERSAMPLE, x1 * SUPERSAMPLE, dtype=np.float32) + 0.5) / step
    y = (np.arange(y0 * SUPERSAMPLE, y1 * SUPERSAMPLE, dtype=np.float32) + 0.5) / step
    return (slice(y0, y1), slice(x0, x1)), x[None, :], y[:, None]


def _mean(inside: Array) -> Array:
    """Share of set sub-pixels per pixel: (3h, 3w) bool to (h, w) float32."""
    height, width = inside.shape
    blocks = inside.reshape(height // SUPERSAMPLE, SUPERSAMPLE, width // SUPERSAMPLE, SUPERSAMPLE)
    return blocks.sum((1, 3), dtype=np.int32).astype(np.float32) / SUPERSAMPLE**2


def _paint(pixels: Array, item: SceneObject, u: Array, v: Array) -> Array:
    """Blend an object into a pixel window in place; u and v are object coordinates in [-1, 1]. Returns its cover."""
    inside = _INSIDE[item.shape](u, v)
    cover = _mean(inside)
    color = np.asarray(COLORS[item.color], np.float32)
    pixels += cover[..., None] * (color - pixels)
    if item.texture != "solid":
        pattern = _stripes(u, v) if item.texture == "striped" else _dots(u, v)
        pixels -= _mean(inside & pattern)[..., None] * ((1 - SHADE) * color)
    return cover


def _stripes(u: Array, v: Array) -> Array:
    return np.mod(u + v, 0.8) < 0.36


def _dots(u: Array, v: Array) -> Array:
    return (np.mod(u, 0.6) - 0.3) ** 2 + (np.mod(v, 0.6) - 0.3) ** 2 < 0.2**2


def _star(u: Array, v: Array) -> Array:
    """Five points: fold the plane into one tenth of the star and test against its single edge."""
    v = v + 0.05
    fifth = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(u, -v) + fifth / 2, fifth) - fifth / 2)
    reach = np.hypot(u, v)
    inner = 0.5 * np.array([np.cos(fifth / 2), np.sin(fifth / 2)], np.float32)
    normal = np.array([inner[1], 1 - inner[0]], np.float32)
    return reach * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) <= normal[0]


def _heart(u: Array, v: Array) -> Array:
    x, y = 1.16 * u, 0.16 - 1.12 * v
    return (x * x + y * y - 1) ** 3 <= x * x * y**3


_INSIDE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: (abs(u) <= 0.9) & (abs(v) <= 0.9),
    "triangle": lambda u, v: (abs(u) <= (v + 1) / 2) & (v <= 0.85),
    "star": _star,
    "cross": lambda u, v: ((abs(u) <= 0.34) & (abs(v) <= 1)) | ((abs(v) <= 0.34) & (abs(u) <= 1)),
    "ring": lambda u, v: abs(u * u + v * v - 0.64) <= 0.36,
    "heart": _heart,
    "diamond": lambda u, v: abs(u) / 0.8 + abs(v) <= 1,
}


def _clutter_box(item: Clutter) -> tuple[float, float, float, float]:
    (x0, y0), (x1, y1), margin = item.start, item.end, item.thickness
    return min(x0, x1) - margin, min(y0, y1) - margin, max(x0, x1) + margin, max(y0, y1) + margin


def _in_capsule(item: Clutter, x: Array, y: Array) -> Array:
    dx, dy = item.end[0] - item.start[0], item.end[1] - item.start[1]
    px, py = x - item.start[0], y - item.start[1]
    along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
    return (px - along * dx) ** 2 + (py - along * dy) ** 2 <= item.thickness**2


def _backdrop(background: Background, width: int, height: int, size: int) -> Array:
    """(H, W, 3) float32 backdrop."""
    first = np.asarray(background.first, np.float32)
    if background.kind == "flat":
        return np.broadcast_to(first, (height, width, 3)).copy()
    x = (np.arange(width, dtype=np.float32) + 0.5)[None, :] / size
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None] / size
    along = x * np.float32(np.cos(background.angle)) + y * np.float32(np.sin(background.angle))
    if background.kind == "ramp":
        span = along.max() - along.min()
        blend = (along - along.min()) / max(float(span), 1e-6)
    else:
        blend = 0.5 + 0.5 * np.sin(2 * np.pi * np.float32(background.frequency) * along)
    return first + blend[..., None] * (np.asarray(background.second, np.float32) - first)
