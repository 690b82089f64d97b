"""The choices of the public code of arXiv 2410.07149, defects included, re-implemented from their description.

Only for comparison, by ``analyze replicate neo2024``; everything else of this package uses exact geometry
(`processing.geometry`) and the scorers of `scorers`. What each function gets wrong is said where it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.analysis.annotated_images import AnnotatedObject
from dualstream.analysis.annotation_files import decode_segmentation
from dualstream.processing.token_boxes import TokenGeometry

from ..scorers import Trap
from ..settings import Query
from ..targets import Target, stated_area

if TYPE_CHECKING:
    from PIL.Image import Image

AREA = (1000.0, 2000.0)  # square pixels of the original picture, both ends excluded
MOST_ANNOTATIONS = 3
LENGTHS = {"generative": 200, "polling": 10, "vqa": 1}


@dataclass(frozen=True)
class Defect:
    """A defect of the public code.

    Attributes:
        what: it is.
        column: what the compatible column does about it: ``reproduced``, ``named`` (it changes no figure here, or
            cannot be reproduced without its inputs), or ``mended`` (it stops the code from running).
    """

    what: str
    column: str


DEFECTS: dict[str, Defect] = {
    "D1": Defect("cells of floor(short side / grid) pixels do not lie on the model's patches", "reproduced"),
    "D2": Defect('integrated gradients of the first id of encode("Yes"): the sentence start, if one is added',
                 "reproduced"),
    "D3": Defect("the path of integrated gradients moves one text token, which may be ranked", "named"),
    "D4": Defect('substring scoring: "cat" in "located"; case counts in descriptions', "reproduced"),
    "D5": Defect("a prediction counts if the class starts with it, an empty one too", "reproduced"),
    "D6": Defect("a mask of False written into a mask of numbers blocks nothing (eager attention)", "named"),
    "D7": Defect("the last entry of the lens is normed twice", "reproduced"),
    "D8": Defect("attribute paths of an old library version", "mended"),
    "D9": Defect("a module of the package is not found when run as documented", "mended"),
    "D10": Defect("scripts read files that were moved", "mended"),
    "D11": Defect("spans of a second image are off by one; one picture per prompt here", "named"),
    "D12": Defect("random sets and the noise tile are drawn once, without a seed (seeded here)", "reproduced"),
    "D13": Defect("windows of unequal width; layer 10 of 32 in one window only; a route with a wrong name",
                  "reproduced"),
    "D14": Defect("zero ablation ignored in VQA, resuming computes again", "mended"),
    "D15": Defect("accuracy over all items, baseline-wrong ones included; drop of whatever token won", "reproduced"),
    "D16": Defect("two precisions within one table", "named"),
    "D17": Defect("the mean vector is saved where the next run reads it as data", "mended"),
    "D18": Defect("masks filled by a loop over pairs", "mended"),
    "D19": Defect("no licence: nothing of it is used here", "named"),
}  # fmt: skip


def chosen_object(objects: Sequence[AnnotatedObject], area: tuple[float, float] = AREA) -> AnnotatedObject | None:
    """The annotation that the public code asks for; crowd regions count as annotations.

    Args:
        objects: of a picture, in the order of the annotation file.
        area: bounds in square pixels, excluded.

    Returns:
        None if there are more than three annotations, or no category (in the order of their first annotation) with a
        single annotation of such an area.
    """
    if len(objects) > MOST_ANNOTATIONS:
        return None
    by_name: dict[str, list[AnnotatedObject]] = {}
    for item in objects:
        by_name.setdefault(item.name, []).append(item)
    for group in by_name.values():
        if len(group) == 1 and area[0] < stated_area(group[0]) < area[1]:
            return group[0]
    return None


def grid_side(geometry: TokenGeometry) -> int:
    """Tokens per side of the one square grid that the public code knows.

    Raises:
        ValueError: the model cuts the picture into another grid.
    """
    if len(geometry.blocks) != 1 or geometry.blocks[0].rows != geometry.blocks[0].cols:
        shown = ", ".join(f"{rows}x{columns}" for rows, columns in geometry.grids)
        raise ValueError(f"the public code knows one square grid of tokens; this picture has {shown}.")
    return geometry.blocks[0].rows


def cells_of_object(item: AnnotatedObject, size: tuple[int, int], side: int) -> np.ndarray:
    """Cells of an object under the public code's geometry (D1).

    The picture is cropped to the square in its middle; a cell is floor(short side / side) pixels wide, so that up to
    side - 1 pixels at the right and lower border belong to no cell, and all cells but the first lie left of and above
    the model's patches unless the short side is a multiple. Vertices of outlines outside the square are dropped one
    by one, which cuts corners; outlines of fewer than three are dropped whole.

    Args:
        item: with outlines, a mask, or else its box.
        size: (width, height) of the picture.
        side: tokens per side.

    Returns:
        (n,) int64 ascending indices of the cells that any pixel of the object touches; empty if nothing is left.
    """
    width, height = size
    square = min(size)
    left, top = (width - square) // 2, (height - square) // 2
    if item.polygons:
        mask = _mask_of_outlines(item.polygons, left, top, square)
    elif item.mask is not None:
        mask = item.mask[top : top + square, left : left + square]
    else:
        x1, y1, x2, y2 = item.box
        outline = (x1, y1, x2, y1, x2, y2, x1, y2)
        mask = _mask_of_outlines((outline,), left, top, square)
    pixels = square // side
    if pixels < 1:
        raise ValueError(f"a picture of {width} x {height} pixels is smaller than the grid of {side} x {side} tokens.")
    used = mask[: pixels * side, : pixels * side].reshape(side, pixels, side, pixels)
    return np.flatnonzero(used.any((1, 3)).ravel())


def _mask_of_outlines(outlines: Sequence[Sequence[float]], left: int, top: int, square: int) -> np.ndarray:
    """(square, square) bool: outlines moved into the crop, vertices beyond it dropped, filled as COCO does."""
    kept = []
    for outline in outlines:
        points = [(x - left, y - top) for x, y in zip(outline[::2], outline[1::2], strict=True)]
        inside = [part for x, y in points if 0 <= x <= square and 0 <= y <= square for part in (x, y)]
        kept += [inside] if len(inside) >= 6 else []
    if not kept:
        return np.zeros((square, square), dtype=bool)
    return decode_segmentation(kept, (square, square))


def dilated(cells: np.ndarray, rings: int, side: int) -> np.ndarray:
    """Cells and their neighbours up to ``rings`` steps, diagonals included, without leaving the grid."""
    grid = np.zeros((side, side), dtype=bool)
    grid.flat[cells] = True
    for _ in range(rings):
        padded = np.pad(grid, 1)
        shifts = [padded[1 + down : 1 + down + side, 1 + right : 1 + right + side] for down in (-1, 0, 1)
                  for right in (-1, 0, 1)]  # fmt: skip
        grid = np.any(shifts, axis=0)
    return np.flatnonzero(grid)


def noise_picture(image: Image, cells: np.ndarray, side: int, rng: np.random.Generator) -> Image:
    """The picture's middle square with one tile of noise pasted over every cell.

    Args:
        image: the picture.
        cells: of ``cells_of_object``.
        side: tokens per side.
        rng: of the tile, drawn without a seed in the public code.
    """
    from PIL import Image as Pictures

    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    pixels = np.array(image.convert("RGB").crop((left, top, left + square, top + square)))
    width = square // side
    tile = rng.integers(0, 256, (width, width, 3), dtype=np.uint8)
    for cell in cells:
        row, column = divmod(int(cell), side)
        pixels[row * width : (row + 1) * width, column * width : (column + 1) * width] = tile
    return Pictures.fromarray(pixels)


def query(target: Target, setting: str, max_new_tokens: int | None = None) -> Query:
    """The public code's wordings: no "an" in polling, "this image", VQA answers begun with "It is a".

    On scenes nothing is begun: the embedded models answer with a word alone, and would have no right baseline.

    Raises:
        ValueError: the setting is unknown, or VQA without a question.
    """
    length = max_new_tokens or LENGTHS.get(setting, 0)
    name, words = target.name, target.words
    if setting == "generative":
        return Query(setting, "Describe this image.", "", (name,), (), words, length)
    if setting == "polling":
        return Query(setting, f"Is there a {name} in this image?", "", ("yes",), ("no",), words, length)
    if setting == "vqa" and target.question:
        start = "" if target.image.scene else "It is a"
        return Query(setting, target.question, start, (name,), target.rivals, words, length)
    raise ValueError(f"setting={setting!r} cannot be asked of picture {target.image.name!r}.")


def judge(setting: str, name: str, text: str, tokenizer: Any | None = None) -> bool:
    """The public code's scorers (D4, D5).

    generative: the class occurs anywhere, by letters, in its own case. polling: "yes" occurs anywhere, in any case.
    vqa: the first piece of the class starts with what was predicted, of which nothing at all is a case.

    Args:
        setting: one of the three.
        name: of the class.
        text: what the model wrote (the prompt left out); in VQA, its first token.
        tokenizer: gives the first piece of the class in VQA; None: the class as a whole.
    """
    if setting == "generative":
        return name in text
    if setting == "polling":
        return "yes" in text.lower()
    piece = name.lower() if tokenizer is None else first_piece(tokenizer, name.lower())
    return piece.startswith(text.strip().lower())


def first_piece(tokenizer: Any, word: str) -> str:
    """Text of a word's first token, without the mark of a word's start."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return tokenizer.convert_ids_to_tokens(ids[0]).lstrip("▁Ġ ")


def judge_trap(trap: Trap) -> bool:
    """What the public code's scorers say to the traps of ``scorers.TRAPS``."""
    setting = {"mention": "generative", "answer": "vqa", "yes": "polling"}[trap.scorer]
    return judge(setting, trap.name, trap.text)


def yes_id(tokenizer: Any) -> int:
    """The id whose logit the public code attributes (D2): the first of ``encode("Yes")``, special tokens included."""
    return int(tokenizer.encode("Yes")[0])


def windows(layers: int) -> dict[str, tuple[int, ...]]:
    """The windows of layers, exact for 32 layers and scaled to other depths (D13)."""
    from ..knockouts.routes import windows_of

    return windows_of("paper", layers)


def even_windows(layers: int) -> dict[str, tuple[int, ...]]:
    """Five windows of equal width that start at equal distances and cover all layers, and ``all``."""
    names = ("early", "early-mid", "mid", "mid-late", "late")
    width = max(math.ceil(layers / 3), 1)
    starts = [round(number * (layers - width) / (len(names) - 1)) for number in range(len(names))]
    return {name: tuple(range(s, s + width)) for name, s in zip(names, starts, strict=True)} | {
        "all": tuple(range(layers))
    }
