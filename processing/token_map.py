"""A picture read as a grid of words: what every visual token says, where, and what compression makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .run_lengths import decode_runs, encode_runs, row_starts
from .token_boxes import TokenGeometry
from .words import decode_pieces, visible

if TYPE_CHECKING:
    from PIL import Image

FORMAT_VERSION = 1


class Run(NamedTuple):
    """A maximal stretch of neighbouring cells that read the same.

    Attributes:
        word: what the run reads, as shown in a cell.
        length: number of cells.
        start: index of the first cell.
        token_id: vocabulary id of the first cell.
        kept: False if compression drops the run.
    """

    word: str
    length: int
    start: int
    token_id: int
    kept: bool


class Region(NamedTuple):
    """Cells of one word.

    Attributes:
        tokens: indices of the visual tokens, ascending.
        block: feature block (image or tile) of a connected region; -1 if the region spans the whole map.
        box: x1, y1, x2, y2 around the cells in original pixels; None without geometry.
    """

    tokens: list[int]
    block: int
    box: tuple[float, float, float, float] | None


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The reading of one image.

    Attributes:
        ids: (N, k) int64, the k best vocabulary ids of every visual token, best first.
        pieces: text of every id in `ids`, with its leading blank (`words.decode_pieces`).
        grids: (rows, cols) of every feature block; blocks follow each other, raster order inside each.
        scores: (N, k) float32 log-probabilities, or None.
        geometry: where the tokens look on the original image, or None.
        run: (N,) int64, index of every cell's run under the compression, or None.
        anchor: (M,) int64, the cells that stand for the kept runs, or None.
        compression: the options the plan was made with, for the record.
        image: the picture itself, for drawing.
    """

    ids: np.ndarray
    pieces: dict[int, str]
    grids: tuple[tuple[int, int], ...]
    scores: np.ndarray | None = None
    geometry: TokenGeometry | None = None
    run: np.ndarray | None = None
    anchor: np.ndarray | None = None
    compression: dict[str, Any] | None = None
    image: Image.Image | None = None

    def __post_init__(self) -> None:
        cells = sum(rows * cols for rows, cols in self.grids)
        if self.ids.ndim != 2 or len(self.ids) != cells or self.ids.shape[1] < 1:
            raise ValueError(f"ids must be ({cells}, k) for the grids {list(self.grids)}, got {self.ids.shape}.")
        if self.scores is not None and self.scores.shape != self.ids.shape:
            raise ValueError(f"scores must have the shape of ids {self.ids.shape}, got {self.scores.shape}.")
        if self.geometry is not None and tuple(self.geometry.grids) != self.grids:
            raise ValueError(
                f"the reading's grids {list(self.grids)} are not the geometry's {self.geometry.grids}; compute the "
                "geometry with the processor and the image size that the reading was made with."
            )
        size = None if self.geometry is None else self.geometry.image_size
        if self.image is not None and size not in (None, self.image.size):
            raise ValueError(f"image is {self.image.size}, the geometry was made for {size} (width, height).")
        if (self.run is None) != (self.anchor is None) or (self.run is not None and len(self.run) != cells):
            raise ValueError(f"run must cover all {cells} cells and come with anchor.")

    @classmethod
    def from_reading(
        cls,
        reading: Any,
        tokenizer: Any,
        geometry: TokenGeometry | None = None,
        image: Image.Image | None = None,
        compression: Any = None,
        image_number: int = 0,
    ) -> TokenMap:
        """Make the map of one image of a reading.

        Args:
            reading: a `VisualReading` (or anything with `ids` (N, k), `grids` (blocks, 2) and perhaps `scores`,
                `image_index`).
            tokenizer: the tokenizer of the model that was read.
            geometry: from `token_geometry(processor, image.size)`; needed to draw.
            image: the picture, as given to the processor.
            compression: a `RunLengthPlan` of the whole reading or of this image, a `CompressionReport` (such as
                `model.last_compression`, which is a reading too), or what `CompressionConfig.from_any` takes ("rle",
                "paper:rle", a dict, ...): the plan is then computed here.
            image_number: which image of the reading, where it holds several.

        Returns:
            The token map.

        Raises:
            ValueError: if the reading holds no such image, or grids, geometry, image and plan do not fit together.
        """
        from .reading_plan import cells_of_image, plan_of_image

        cells, grids = cells_of_image(reading, image_number)
        ids = _array(reading.ids)[cells].astype(np.int64)
        scores = getattr(reading, "scores", None)
        run, anchor, options = plan_of_image(compression, ids, grids, tokenizer, cells, len(reading.ids))
        return cls(
            ids=ids,
            pieces=decode_pieces(tokenizer, ids),
            grids=grids,
            scores=None if scores is None else _array(scores)[cells].astype(np.float32),
            geometry=geometry,
            run=run,
            anchor=anchor,
            compression=options,
            image=image,
        )

    def __len__(self) -> int:
        """Number N of visual tokens."""
        return len(self.ids)

    @cached_property
    def words(self) -> list[str]:
        """Best word of every cell, as shown (`words.visible`)."""
        return [visible(self.pieces[number]) for number in self.ids[:, 0].tolist()]

    @property
    def grid(self) -> list[list[list[str]]]:
        """The words as nested lists: block, row, column."""
        words = iter(self.words)
        return [[[next(words) for _ in range(cols)] for _ in range(rows)] for rows, cols in self.grids]

    @cached_property
    def keeps(self) -> np.ndarray:
        """(N,) bool: False for the cells that compression drops; all True without compression."""
        if self.run is None or self.anchor is None:
            return np.ones(len(self), dtype=bool)
        return np.isin(self.run, self.run[self.anchor])

    @property
    def kept(self) -> int:
        """Number of visual tokens left after compression."""
        return len(self) if self.anchor is None else len(self.anchor)

    @property
    def reduction_rate(self) -> float:
        """1 - kept / N; 0 without compression."""
        return 1 - self.kept / len(self) if len(self) else 0.0

    @cached_property
    def cell_runs(self) -> np.ndarray:
        """(N,) int64: index of the run each cell belongs to, under the plan or, without one, within grid rows."""
        if self.run is not None:
            return self.run
        pairs = encode_runs(self.ids[:, 0].tolist(), row_starts(self.grids))
        return np.repeat(np.arange(len(pairs)), [length for _, length in pairs])

    @property
    def runs(self) -> list[Run]:
        """The map as runs, in sequence order; (word, length) come first."""
        starts = np.flatnonzero(np.diff(self.cell_runs, prepend=-1))
        lengths = np.diff(starts, append=len(self))
        return [
            Run(self.words[start], int(length), int(start), int(self.ids[start, 0]), bool(self.keeps[start]))
            for start, length in zip(starts.tolist(), lengths, strict=True)
        ]

    def regions(self, connected: bool = False) -> dict[str, list[Region]]:
        """Cells of every word, most frequent word first.

        Args:
            connected: split each word's cells into parts that touch along a side within one block.

        Returns:
            Word to its regions: one per word, or one per connected part, largest first.
        """
        cells_of: dict[str, list[int]] = {}
        for cell, word in enumerate(self.words):
            cells_of.setdefault(word, []).append(cell)
        return {
            word: self._parts(cells_of[word]) if connected else [self._region(cells_of[word], -1)]
            for word, _ in self.counts
        }

    @cached_property
    def counts(self) -> list[tuple[str, int]]:
        """(word, cells), most frequent first, ties in alphabetical order."""
        return sorted(Counter(self.words).items(), key=lambda item: (-item[1], item[0]))

    def find(self, word: str, top_k: int = 1) -> np.ndarray:
        """Indices of the cells that read a word, whatever its case and leading blank.

        Args:
            word: the word to look for.
            top_k: how many of the best readings of a cell to search.

        Returns:
            (n,) int64, ascending.
        """
        wanted = visible(word).casefold()
        matching = [number for number, piece in self.pieces.items() if visible(piece).casefold() == wanted]
        return np.flatnonzero(np.isin(self.ids[:, :top_k], matching).any(axis=1))

    def to_text(self, max_word: int = 12) -> str:
        """The map as an aligned grid of text; see `token_map_text.render_text`."""
        from .token_map_text import render_text

        return render_text(self, max_word)

    def to_image(self, max_side: int = 2400, title: str = "", font: str | Path | None = None) -> Image.Image:
        """The map drawn over the picture; see `token_map_image.render_image`."""
        from .token_map_image import render_image

        return render_image(self, max_side, title, font)

    def to_html(self, title: str = "Token map") -> str:
        """The map as one self-contained page; see `token_map_html.render_html`."""
        from .token_map_html import render_html

        return render_html(self, title)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without the picture; `from_dict` gives an equal map back."""
        return {
            "version": FORMAT_VERSION,
            "grids": [list(grid) for grid in self.grids],
            "runs": encode_runs(self.ids[:, 0].tolist(), row_starts(self.grids)),
            "others": self.ids[:, 1:].tolist(),
            "pieces": {str(number): piece for number, piece in self.pieces.items()},
            "scores": None if self.scores is None else [[round(float(x), 4) for x in row] for row in self.scores],
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "cell_runs": None if self.run is None else self.run.tolist(),
            "anchor": None if self.anchor is None else self.anchor.tolist(),
            "compression": self.compression,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], image: Image.Image | None = None) -> TokenMap:
        """Rebuild a map from `to_dict`'s values, and the picture if it is to be drawn.

        Raises:
            ValueError: if the values were written by an unknown version.
        """
        if values.get("version") != FORMAT_VERSION:
            raise ValueError(f"token map version {values.get('version')!r} is unknown; this reads {FORMAT_VERSION}.")
        best = np.array(decode_runs(values["runs"]), dtype=np.int64)[:, None]
        others = np.array(values["others"], dtype=np.int64).reshape(len(best), -1)
        optional = {name: values[name] for name in ("scores", "cell_runs", "anchor")}
        arrays = {name: None if value is None else np.array(value) for name, value in optional.items()}
        return cls(
            ids=np.concatenate([best, others], axis=1),
            pieces={int(number): piece for number, piece in values["pieces"].items()},
            grids=tuple((rows, cols) for rows, cols in values["grids"]),
            scores=None if arrays["scores"] is None else arrays["scores"].astype(np.float32),
            geometry=None if values["geometry"] is None else TokenGeometry.from_dict(values["geometry"]),
            run=arrays["cell_runs"],
            anchor=arrays["anchor"],
            compression=values["compression"],
            image=image,
        )

    def _region(self, tokens: list[int], block: int) -> Region:
        """A region with the box around its cells."""
        if self.geometry is None:
            return Region(tokens, block, None)
        boxes = self.geometry.boxes[tokens]
        x1, y1 = boxes[:, :2].min(axis=0).tolist()
        x2, y2 = boxes[:, 2:].max(axis=0).tolist()
        return Region(tokens, block, (x1, y1, x2, y2))

    def _parts(self, cells: Sequence[int]) -> list[Region]:
        """Split cells into parts connected along sides within a block, largest first."""
        places = {tuple(place): cell for place, cell in zip(self.places[list(cells)].tolist(), cells, strict=True)}
        regions = []
        while places:
            first = next(iter(places))
            part, open_places = [places.pop(first)], [first]
            while open_places:
                block, row, col = open_places.pop()
                for near in (
                    (block, row, col + 1),
                    (block, row + 1, col),
                    (block, row, col - 1),
                    (block, row - 1, col),
                ):
                    if near in places:
                        part.append(places.pop(near))
                        open_places.append(near)
            regions.append(self._region(sorted(part), first[0]))
        return sorted(regions, key=lambda region: (-len(region.tokens), region.tokens[0]))

    @cached_property
    def places(self) -> np.ndarray:
        """(N, 3) int64: block, row and column of every cell."""
        parts = [
            np.stack([np.full(rows * cols, block), *np.divmod(np.arange(rows * cols), cols)], axis=1)
            for block, (rows, cols) in enumerate(self.grids)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.int64)


def _array(values: Any) -> np.ndarray:
    """A tensor on any device, or an array, as a NumPy array; NumPy has no bfloat16."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)
