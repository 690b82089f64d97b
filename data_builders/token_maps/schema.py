"""Columns of a token-map corpus, and the table of one shard made from arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dualstream.processing import TokenGeometry, TokenMap, row_starts

from .depths import Depth, stage_of
from .images import ImageFacts

BOX_FORMAT = "x1, y1, x2, y2 in pixels of the original image, right and bottom exclusive, clipped to the image"

#: column -> what the card says of it
COLUMNS: dict[str, str] = {
    "image_hash": "SHA-256 of `WIDTHxHEIGHT:` and the decoded 8-bit RGB pixels, row by row",
    "source_id": "name of the image in its source",
    "index": "position of the image in its source, from 0; images that could not be read leave a gap",
    "stage": "`connector` (before the language model) or `llm` (inside it)",
    "depth": "language-model blocks executed before the reading; null at the connector",
    "final_norm": "whether the language model's last norm was applied before the output matrix",
    "image_size": "width, height in pixels",
    "grids": "rows, columns of every feature block (image or tile), in the order of the tokens",
    "boxes": f"rectangle of every token: {BOX_FORMAT}",
    "blocks": "the same geometry without rounding or clipping: origin and cell size of every block in pixels",
    "token_ids": "the k likeliest vocabulary ids of every token, best first; block by block, row by row",
    "log_probs": "their natural-log probabilities, over the vocabulary or the classes of the decoder",
    "text": "text of every token's best id, with its leading blank where it starts a word",
    "runs": "the best ids run-length encoded; a run ends at the end of a grid row",
    "model": "model that was read",
    "model_revision": "`commit:` of the Hub, or `sha256:` of the weights as they were loaded",
    "decoder_kind": "what read the tokens: `unembedding` (the model's output matrix) or the kind of visual decoder",
    "decoder_hash": "SHA-256 of its weights",
}


@dataclass(frozen=True)
class Provenance:
    """What is the same in every row of one depth.

    Attributes:
        depth: None for the connector.
        final_norm: whether the last norm was applied; False at the connector.
        model: name of the model.
        model_revision: commit or content hash.
        decoder_kind: see ``COLUMNS``.
        decoder_hash: see ``COLUMNS``.
    """

    depth: Depth
    final_norm: bool
    model: str
    model_revision: str
    decoder_kind: str
    decoder_hash: str


@dataclass(frozen=True)
class MapReading:
    """Readings of one image at one depth: ids (N, k) int32 and log_probs (N, k) float32, and where its tokens are."""

    facts: ImageFacts
    geometry: TokenGeometry
    ids: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Vocabulary:
    """Text of every vocabulary id."""

    pieces: tuple[str, ...]

    @cached_property
    def array(self) -> pa.Array:
        """The pieces as an Arrow array."""
        return pa.array(self.pieces, pa.string())

    def take(self, ids: np.ndarray) -> pa.Array:
        """Text of every id, (n,) string."""
        return self.array.take(pa.array(ids))


def features(top_k: int) -> datasets.Features:
    """Return the typed columns of a corpus with `top_k` readings per token."""
    from datasets import List, Value

    block = {name: Value("int32") for name in ("rows", "cols")}
    block |= {name: Value("float64") for name in ("left", "top", "cell_width", "cell_height")}
    types = {
        "index": Value("int64"),
        "depth": Value("int32"),
        "final_norm": Value("bool"),
        "image_size": List(Value("int32"), length=2),
        "grids": List(List(Value("int32"), length=2)),
        "boxes": List(List(Value("float32"), length=4)),
        "blocks": List({**block, "thumbnail": Value("bool")}),
        "token_ids": List(List(Value("int32"), length=top_k)),
        "log_probs": List(List(Value("float32"), length=top_k)),
        "text": List(Value("string")),
        "runs": List({"token_id": Value("int32"), "length": Value("int32"), "text": Value("string")}),
    }
    return datasets.Features({name: types.get(name, Value("string")) for name in COLUMNS})


def shard_table(
    readings: Sequence[MapReading], provenance: Provenance, vocabulary: Vocabulary, top_k: int
) -> pa.Table:
    """Make the table of one shard at one depth, one row per reading, in their order.

    Args:
        readings: one per image; may be empty.
        provenance: the constant columns.
        vocabulary: text of the ids.
        top_k: readings per token, k.

    Returns:
        A table of the schema ``features(top_k).arrow_schema``.
    """
    facts = [reading.facts for reading in readings]
    tokens = _offsets([len(reading.ids) for reading in readings])
    ids = _concatenated([reading.ids for reading in readings], np.int32, top_k)
    log_probs = _concatenated([reading.log_probs for reading in readings], np.float32, top_k)
    columns: dict[str, Any] = {
        "image_hash": pa.array([fact.image_hash for fact in facts], pa.string()),
        "source_id": pa.array([fact.source_id for fact in facts], pa.string()),
        "index": pa.array([fact.index for fact in facts], pa.int64()),
        "image_size": _fixed(np.array([fact.size for fact in facts], np.int32).reshape(-1, 2)),
        "token_ids": pa.ListArray.from_arrays(tokens, _fixed(ids)),
        "log_probs": pa.ListArray.from_arrays(tokens, _fixed(log_probs)),
        "text": pa.ListArray.from_arrays(tokens, vocabulary.take(ids[:, 0])),
        "runs": _runs(readings, ids[:, 0], tokens, vocabulary),
        **_geometry_columns([reading.geometry for reading in readings], tokens),
        **{name: _constant(value, len(facts)) for name, value in _constants(provenance).items()},
    }
    schema = features(top_k).arrow_schema
    return pa.Table.from_arrays([columns[name].cast(schema.field(name).type) for name in COLUMNS], schema=schema)


def token_map_of_row(row: dict[str, Any], image: Any = None, tokenizer: Any = None) -> TokenMap:
    """Turn a row of a corpus back into a token map, to draw it or to ask it.

    Args:
        row: one example of the dataset.
        image: the picture itself, to draw the words over.
        tokenizer: the model's; without one only the best reading of every token has a text and is kept.

    Returns:
        The token map.
    """
    from dualstream.processing import decode_pieces

    ids = np.asarray(row["token_ids"], dtype=np.int64)
    scores = np.asarray(row["log_probs"], dtype=np.float32)
    if tokenizer is None:
        ids, scores = ids[:, :1], scores[:, :1]
        pieces = dict(zip(ids[:, 0].tolist(), row["text"], strict=True))
    else:
        pieces = decode_pieces(tokenizer, ids)
    geometry = TokenGeometry.from_dict({"image_size": row["image_size"], "blocks": row["blocks"]})
    grids = tuple((int(rows), int(cols)) for rows, cols in row["grids"])
    return TokenMap(ids, pieces, grids, scores=scores, geometry=geometry, image=image)


def _constants(provenance: Provenance) -> dict[str, pa.Scalar]:
    return {
        "stage": pa.scalar(stage_of(provenance.depth)),
        "depth": pa.scalar(provenance.depth, pa.int32()),
        "final_norm": pa.scalar(provenance.final_norm),
        "model": pa.scalar(provenance.model),
        "model_revision": pa.scalar(provenance.model_revision),
        "decoder_kind": pa.scalar(provenance.decoder_kind),
        "decoder_hash": pa.scalar(provenance.decoder_hash),
    }


def _constant(value: pa.Scalar, count: int) -> pa.Array:
    return pa.repeat(value, count) if value.is_valid else pa.nulls(count, value.type)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    """Offsets of a list array whose rows have these lengths."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))


def _concatenated(parts: Sequence[np.ndarray], dtype: Any, width: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, width), dtype), *parts]).astype(dtype, copy=False)


def _fixed(values: np.ndarray) -> pa.Array:
    """An (n, width) array as n lists of `width` values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


@lru_cache(maxsize=4096)
def _row_start_mask(grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(N,) bool, true where a grid row starts."""
    mask = np.zeros(sum(rows * cols for rows, cols in grids), dtype=bool)
    mask[row_starts(grids)] = True
    return mask


def _runs(readings: Sequence[MapReading], best: np.ndarray, tokens: pa.Array, vocabulary: Vocabulary) -> pa.Array:
    """The runs of every row as a list of structures."""
    starts = np.concatenate(
        [np.zeros(0, bool), *[_row_start_mask(tuple(reading.geometry.grids)) for reading in readings]]
    )
    starts[1:] |= best[1:] != best[:-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=len(best)).astype(np.int32)
    before = np.concatenate([[0], np.cumsum(starts)])  # runs that start before each token
    fields = [pa.array(best[first]), pa.array(lengths), vocabulary.take(best[first])]
    values = pa.StructArray.from_arrays(fields, names=["token_id", "length", "text"])
    return pa.ListArray.from_arrays(pa.array(before[tokens.to_numpy()].astype(np.int32)), values)


def _geometry_columns(geometries: Sequence[TokenGeometry], tokens: pa.Array) -> dict[str, pa.Array]:
    """``grids``, ``boxes`` and ``blocks`` of every row."""
    blocks = [block for geometry in geometries for block in geometry.blocks]
    offsets = _offsets([len(geometry.blocks) for geometry in geometries])
    grids = np.array([(block.rows, block.cols) for block in blocks], np.int32).reshape(-1, 2)
    boxes = _concatenated([geometry.boxes for geometry in geometries], np.float32, 4)
    fields = {
        "rows": pa.array(grids[:, 0]),
        "cols": pa.array(grids[:, 1]),
        **{
            name: pa.array([getattr(block, name) for block in blocks], pa.float64())
            for name in ("left", "top", "cell_width", "cell_height")
        },
        "thumbnail": pa.array([block.thumbnail for block in blocks], pa.bool_()),
    }
    return {
        "grids": pa.ListArray.from_arrays(offsets, _fixed(grids)),
        "boxes": pa.ListArray.from_arrays(tokens, _fixed(boxes)),
        "blocks": pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(list(fields.values()), list(fields))),
    }
