"""Pictures and tokens with objects painted or averaged away, and the same done elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from dualstream.analysis.annotated_images import Box

FILLINGS = ("mean", "resample", "other")
TRIES = 200


def covered(boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels that some box touches.

    Args:
        boxes: x1, y1, x2, y2 in pixels.
        size: (width, height).
    """
    mask = np.zeros(size[::-1], dtype=bool)
    for box in boxes:
        left, top, right, bottom = pixels_of(box)
        mask[top:bottom, left:right] = True
    return mask


def pixels_of(box: Box) -> tuple[int, int, int, int]:
    """Whole pixels that a box touches: left, top, right, bottom, the latter two exclusive."""
    return int(np.floor(box[0])), int(np.floor(box[1])), int(np.ceil(box[2])), int(np.ceil(box[3]))


def free_box(box: Box, taken: np.ndarray, rng: np.random.Generator) -> Box:
    """A box of the same size elsewhere in a picture, off the pixels taken (or touching as few as can be found).

    Args:
        box: whose size counts; cut to the picture if it is larger.
        taken: (H, W) bool.
        rng: seeded by the caller.
    """
    left, top, right, bottom = pixels_of(box)
    height, width = min(bottom - top, taken.shape[0]), min(right - left, taken.shape[1])
    best, least = (0, 0), np.inf
    for _ in range(TRIES):
        x, y = int(rng.integers(taken.shape[1] - width + 1)), int(rng.integers(taken.shape[0] - height + 1))
        touched = int(taken[y : y + height, x : x + width].sum())
        if touched < least:
            best, least = (x, y), touched
        if not touched:
            break
    return float(best[0]), float(best[1]), float(best[0] + width), float(best[1] + height)


def painted(
    image: Image.Image,
    boxes: Sequence[Box],
    objects: Sequence[Box],
    filling: str,
    other: tuple[Image.Image, Sequence[Box]],
    rng: np.random.Generator,
) -> Image.Image:
    """Paint over boxes of a picture.

    Args:
        image: RGB.
        boxes: to paint over.
        objects: the objects' boxes; pixels outside them are the background.
        filling: ``mean`` of the background, ``resample``: pixels of the background in random order, or ``other``: a
            piece of another picture's background.
        other: that picture and its objects' boxes.
        rng: seeded by the caller.

    Raises:
        ValueError: there is no such filling.
    """
    if filling not in FILLINGS:
        raise ValueError(f"filling is {filling!r}; accepted are {', '.join(FILLINGS)}.")
    pixels = np.array(image.convert("RGB"))
    background = pixels[~covered(objects, image.size)]
    for box in boxes:
        left, top, right, bottom = pixels_of(box)
        region = pixels[top:bottom, left:right]
        if filling == "mean":
            region[:] = background.mean(0).round()
        elif filling == "resample":
            region[:] = background[rng.integers(len(background), size=region.shape[:2])]
        else:
            source, taken = other[0].convert("RGB"), covered(other[1], other[0].size)
            piece = source.crop(pixels_of(free_box(box, taken, rng)))
            region[:] = np.asarray(piece.resize((region.shape[1], region.shape[0])))
    return Image.fromarray(pixels)


def filled(
    states: torch.Tensor,
    tokens: np.ndarray,
    background: np.ndarray,
    filling: str,
    bank: torch.Tensor,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Replace tokens by background.

    Args:
        states: (N, d) of one picture.
        tokens: to replace.
        background: tokens of the same picture that show no object.
        filling: ``mean`` of the background, ``resample``: background tokens drawn at random, or ``other``: tokens
            drawn from the backgrounds of other pictures.
        bank: (M, d) those of other pictures, at the same place in the model.
        rng: seeded by the caller.

    Raises:
        ValueError: there is no such filling.
    """
    if filling not in FILLINGS:
        raise ValueError(f"filling is {filling!r}; accepted are {', '.join(FILLINGS)}.")
    states = states.clone()
    source = states[torch.from_numpy(background)] if filling != "other" else bank.to(states)
    if filling == "mean":
        states[torch.from_numpy(tokens)] = source.mean(0)
    else:
        states[torch.from_numpy(tokens)] = source[torch.from_numpy(rng.integers(len(source), size=len(tokens)))]
    return states
