"""What tests of pages share: made-up readings with hostile words, and a parser that takes a page apart."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

from dualstream.processing.page_data import Outline
from dualstream.processing.reading_series import CompressionPlans, ReadingPoint, ReadingSeries
from dualstream.processing.token_boxes import Block, TokenGeometry

HOSTILE = {
    0: " sky",
    1: " dog",
    2: "Dog",
    3: "</script><script>window.hacked = 1</script>",
    4: "<!--<img src=x onerror='window.hacked = 2'>",
    5: "\u2028\u2029",
    6: "\u202eevil\u202c",
    7: " \u05e9\u05dc\u05d5\u05dd",
    8: "\U0001f469\u200d\U0001f680",
    9: "\ud800",
    10: ",",
    11: " " * 3,
    12: "",
    13: " \u5929\u7a7a",
    14: "`${window.hacked = 3}`",
    15: "a\x00b\x1b[31m",
    16: " photographersandotherlongwords",
}


def make_series(
    name: str = "one",
    grid: tuple[int, int] = (3, 4),
    vision: int = 3,
    llm: int = 2,
    k: int = 3,
    size: tuple[int, int] = (80, 60),
    seed: int = 0,
    **more: Any,
) -> ReadingSeries:
    """Readings at every vision depth 0..vision and language-model depth None, 0..llm; every hostile word occurs."""
    rng = np.random.default_rng(seed)
    rows, cols = grid
    inside: list[int | None] = [None, *range(llm + 1)]
    points = tuple(ReadingPoint(j, i, "" if i is None else "normed") for j in range(vision + 1) for i in inside)
    shape = (len(points), rows * cols)
    ids = np.argsort(rng.random((*shape, len(HOSTILE))), axis=-1)[..., :k]
    scores = np.log(np.sort(rng.dirichlet(np.ones(k + 1), shape)[..., :k], axis=-1)[..., ::-1])
    geometry = TokenGeometry(size, (Block(rows, cols, 0, 0, size[0] / cols, size[1] / rows),))
    run = np.cumsum(np.diff(ids[..., 0], axis=1, prepend=-1) != 0, axis=1) - 1
    first = np.diff(run, axis=1, prepend=-1) != 0
    kept = ids[..., 0] % 3 != 0
    plans = (
        CompressionPlans("rle", run, np.ones(shape, bool), first),
        CompressionPlans("rle_drop_top1", run, kept, first & kept),
    )
    options = {"scores": scores.astype(np.float32), "plans": plans, "native_vision": vision, "start": len(points) - 1}
    return ReadingSeries(name, points, ids, HOSTILE, geometry, **(options | more))


def make_outlines(size: tuple[int, int] = (80, 60)) -> list[Outline]:
    mask = np.zeros(size[::-1], bool)
    mask[10:30, 20:40] = True
    return [Outline("a <b>box</b>", (20, 10, 40, 30), mask), Outline("no mask", (0, 0, 10, 10))]


def make_picture(size: tuple[int, int] = (80, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


class Page(HTMLParser):
    """Tags, attributes and script data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data) -> None:
        (self.scripts if self.tags[-1:] == ["script"] else self.texts).append(data)

    def values(self, *names: str) -> list[str | None]:
        return [value for _, name, value in self.attributes if name in names]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def decoded(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def probabilities(text: str, *shape: int) -> np.ndarray:
    return np.exp(decoded(text, "<u2", *shape).astype(float) / -4096)
