"""Scenes as a `datasets.Dataset`, all at once or row by row."""

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from .questions import KINDS, caption, questions
from .render import rasterize
from .scene import COLORS, SHAPES, TEXTURES, make_scene, split_seeds

#: Columns. `box`: left, top, right, bottom in pixels, right and bottom exclusive. `mask`: run lengths of the flattened
#: (row by row) visible-pixel mask, alternately pixels outside and inside, starting outside; see `decode_mask`.
FEATURES = Features(
    {
        "image": Image(),
        "seed": Value("int64"),
        "width": Value("int32"),
        "height": Value("int32"),
        "caption": Value("string"),
        "objects": List(
            {
                "shape": ClassLabel(names=list(SHAPES)),
                "color": ClassLabel(names=list(COLORS)),
                "texture": ClassLabel(names=list(TEXTURES)),
                "box": List(Value("int32"), length=4),
                "mask": List(Value("int32")),
            }
        ),
        "questions": List(
            {
                "kind": ClassLabel(names=list(KINDS)),
                "form": Value("string"),
                "question": Value("string"),
                "answer": Value("string"),
                "objects": List(Value("int32")),
            }
        ),
    }
)


def encode_mask(mask: np.ndarray) -> list[int]:
    """Run lengths of a bool mask (H, W), row by row, outside first; their sum is H·W."""
    flat = np.concatenate([[False], mask.reshape(-1), [not mask.reshape(-1)[-1]]])
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], borders])).tolist()


def decode_mask(runs: list[int], width: int, height: int) -> np.ndarray:
    """The bool mask (H, W) of :func:`encode_mask`.

    Raises:
        ValueError: If the run lengths do not add up to width·height.
    """
    if sum(runs) != width * height:
        raise ValueError(
            f"runs add up to {sum(runs)} pixels; the mask of a {width} x {height} image has {width * height}."
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


def scene_row(seed: int, size: int = 96, aspect: float = 1.0) -> dict[str, Any]:
    """The dataset row of a seed; one question of every kind the scene admits."""
    scene = make_scene(seed, aspect)
    raster = rasterize(scene, size)
    png = io.BytesIO()
    PILImage.fromarray(raster.image).save(png, "png", compress_level=1)
    return {
        "image": {"bytes": png.getvalue(), "path": f"{seed}.png"},
        "seed": seed,
        "width": raster.image.shape[1],
        "height": raster.image.shape[0],
        "caption": caption(scene),
        "objects": [
            {
                "shape": item.shape,
                "color": item.color,
                "texture": item.texture,
                "box": box.tolist(),
                "mask": encode_mask(mask),
            }
            for item, box, mask in zip(scene.objects, raster.boxes, raster.masks, strict=True)
        ],
        "questions": [
            {"kind": q.kind, "form": q.form, "question": q.text, "answer": q.answer, "objects": list(q.objects)}
            for q in questions(scene, random.Random(f"questions-{seed}"))
        ],
    }


def build_scenes(split: str, n: int, *, start: int = 0, size: int = 96, aspect: float = 1.0) -> Dataset:
    """Scenes `start` to `start + n` of a split as a typed dataset in memory.

    Args:
        split: "train", "validation" or "test"; their seeds are disjoint.
        n: Number of scenes.
        start: First scene within the split.
        size: Shorter side in pixels.
        aspect: Width divided by height.
    """
    rows = [scene_row(seed, size, aspect) for seed in split_seeds(split, n, start)]
    return Dataset.from_list(rows, features=FEATURES)


def stream_scenes(split: str, n: int, *, size: int = 96, aspect: float = 1.0) -> Iterator[dict[str, Any]]:
    """The rows of :func:`build_scenes` one by one, nothing kept."""
    for seed in split_seeds(split, n):
        yield scene_row(seed, size, aspect)
