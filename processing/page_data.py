"""What the page of a picture knows, as compact JSON: arrays in base64, every text escaped.

Layout of the arrays, all little-endian and in the order point, cell, rank:

- ``top``: uint16 (uint32 from 65,536 entries on), index of a reading in the series' table of entries
- ``nats``: uint16, -log p in units of 1 / 4096 nat; 65535 stands for 16 nats or more
- ``flags`` of a compression: uint8, 1: a run starts here, 2: the run is kept, 4: the cell stands for its run
- ``boxes``: float32, x1, y1, x2, y2 of every cell in pixels of the picture
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .lettering import NEUTRAL, colours_of
from .words import has_meaning, visible

if TYPE_CHECKING:
    from PIL import Image

    from .reading_series import CompressionPlans, ReadingSeries

PICTURE_SIDE = 1600  # longest side of the embedded picture in pixels
MASK_SIDE = 512  # longest side of an embedded mask
PER_NAT = 4096
STARTS, KEPT, ANCHOR = 1, 2, 4


@dataclass(frozen=True, eq=False)
class Outline:
    """Something known to be in the picture.

    Attributes:
        name: what it is.
        box: x1, y1, x2, y2 in pixels.
        mask: (H, W) bool over the picture, or None.
    """

    name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def page_data(
    series: Sequence[ReadingSeries],
    image: Image.Image | None,
    outlines: Sequence[Outline] = (),
    compressed_first: bool = False,
) -> dict[str, Any]:
    """Everything that the page draws, as plain JSON values.

    Args:
        series: readings of one picture, by one model each.
        image: the picture, or None.
        outlines: objects to draw on demand.
        compressed_first: show what the first compression keeps before anything is chosen.

    Raises:
        ValueError: if there is no series, or pictures of different sizes were read.
    """
    sizes = {item.geometry.image_size for item in series} | ({image.size} if image is not None else set())
    if not series or len(sizes) != 1:
        raise ValueError(f"series must be readings of one picture; got {len(series)} of the sizes {sorted(sizes)}.")
    words = _word_list(series)
    pieces = {piece for item in series for piece in map(item.pieces.__getitem__, item.used_ids.tolist())}
    meant = {visible(piece) for piece in pieces if has_meaning(piece)}
    colours = colours_of([word for word in words if word in meant])
    place = {word: number for number, word in enumerate(words)}
    return {
        "size": list(series[0].geometry.image_size),
        "picture": None if image is None else picture_uri(image),
        "words": words,
        "meaning": "".join("1" if word in meant else "0" for word in words),
        "colours": {str(place[word]): _hexadecimal(colour) for word, colour in colours.items() if colour != NEUTRAL},
        "objects": [_outline(item) for item in outlines],
        "series": [_series(item, place) for item in series],
        "compressed": compressed_first,
    }


def to_script(data: Any) -> str:
    """JSON that may stand inside a script element: ASCII alone, so that no text can end it or be half a character."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def picture_uri(image: Image.Image, side: int = PICTURE_SIDE, quality: int = 85) -> str:
    """A picture as a data URI, no longer than `side`: PNG where it is small, JPEG otherwise."""
    picture = image.convert("RGB")
    stream = io.BytesIO()
    if max(picture.size) <= min(side, 256):
        picture.save(stream, "PNG")
        kind = "png"
    else:
        picture.thumbnail((side, side))
        picture.save(stream, "JPEG", quality=quality)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def quantized(log_probabilities: np.ndarray) -> np.ndarray:
    """Log-probabilities as uint16 in units of 1 / 4096 nat; what is no number counts as 16 nats or more."""
    nats = np.nan_to_num(-np.asarray(log_probabilities, dtype=np.float64), nan=np.inf, posinf=np.inf)
    return np.clip(np.rint(np.minimum(nats, 16) * PER_NAT), 0, 65535).astype("<u2")


def _word_list(series: Sequence[ReadingSeries]) -> list[str]:
    """Words as shown, the most frequent best reading first."""
    counts: Counter[str] = Counter()
    for item in series:
        counts.update({visible(item.pieces[number]): 0 for number in item.used_ids.tolist()})
        ids, times = np.unique(item.ids[:, :, 0], return_counts=True)
        for number, count in zip(ids.tolist(), times.tolist(), strict=True):
            counts[visible(item.pieces[number])] += count
    return [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def _series(item: ReadingSeries, place: dict[str, int]) -> dict[str, Any]:
    numbers = item.used_ids
    pieces = [item.pieces[number] for number in numbers.tolist()]
    geometry = item.geometry
    width = "<u2" if len(numbers) < 65536 else "<u4"
    return {
        "name": shown(item.name),
        "points": [[point.vision, point.llm, shown(point.lens)] for point in item.points],
        "start": item.start,
        "native": item.native_vision,
        "k": item.ids.shape[2],
        "grids": [list(grid) for grid in geometry.grids],
        "thumbnails": [block.thumbnail for block in geometry.blocks],
        "boxes": _encoded(geometry.boxes.astype("<f4")),
        "ids": numbers.tolist(),
        "word_of": [place[visible(piece)] for piece in pieces],
        "blank": "".join("1" if piece.startswith(" ") and piece.strip(" ") else "0" for piece in pieces),
        "wide": width == "<u4",
        "top": _encoded(np.searchsorted(numbers, item.ids).astype(width)),
        "nats": None if item.scores is None else _encoded(quantized(item.scores)),
        "plans": [{"name": shown(plan.name), "flags": _encoded(_flags(plan))} for plan in item.plans],
        "tracked": {visible(word): _encoded(quantized(values)) for word, values in item.tracked.items()},
    }


def _flags(plan: CompressionPlans) -> np.ndarray:
    starts = np.diff(plan.run, axis=1, prepend=-1) != 0
    return (STARTS * starts + KEPT * plan.kept + ANCHOR * plan.anchor).astype(np.uint8)


def _outline(item: Outline) -> dict[str, Any]:
    mask = None
    if item.mask is not None:
        step = max(1, -(-max(item.mask.shape) // MASK_SIDE))
        small = np.asarray(item.mask, bool)[step // 2 :: step, step // 2 :: step]
        edges = np.flatnonzero(np.diff(small.reshape(-1), prepend=False)).tolist()
        # lengths of alternating stretches, outside first
        mask = {"size": list(small.shape), "runs": np.diff([0, *edges, small.size]).tolist()}
    return {"name": shown(item.name), "box": [round(float(value), 2) for value in item.box], "mask": mask}


def shown(text: str) -> str:
    """A name as it is shown: nothing invisible, nothing that changes how its neighbours show; blanks stay."""
    return " ".join(visible(part) for part in text.split(" ") if part)


def _encoded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _hexadecimal(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
