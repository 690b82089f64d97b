"""What one picture reads as at several depths: the record that is computed, stored, analysed and shown.

Columns of the Parquet file of a picture, one row per step:

- ``image``: name in the source; ``geometry``: JSON of ``TokenGeometry.to_dict()`` (image size, grid of every block)
- ``vision_depth``: blocks of the vision tower that were run; ``native``: whether that is what the model itself reads
- ``llm_depth``: blocks of the language model that were run, null for the connector's output
- ``lens``: ``normed`` (final norm, then output matrix), ``plain`` (output matrix alone), ``tuned`` (affine map, final
  norm, output matrix) or ``decoder`` (the visual decoder of the model, at the connector)
- ``norm_matched``: whether the connector's features were scaled to the norm that they have at the native depth
- ``ids``: (N, k) int32 vocabulary ids, best first, flattened; N visual tokens in feature order, each block by rows
- ``log_probs``: (N, k) float32, natural logarithms of their probabilities over the whole vocabulary (over the classes
  of a pruned decoder)
- ``tracked``: (N, T) float32, log-probabilities of the tracked words, each summed over its vocabulary entries
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dualstream.data_builders.token_maps.atomic import atomic_file
from dualstream.processing import TokenGeometry

NORMED, PLAIN, TUNED, DECODER = "normed", "plain", "tuned", "decoder"
LENSES = (NORMED, PLAIN, TUNED)
VOCABULARY = "vocabulary.parquet"
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("geometry", pa.string()),
        ("vision_depth", pa.int16()),
        ("native", pa.bool_()),
        ("llm_depth", pa.int16()),
        ("lens", pa.string()),
        ("norm_matched", pa.bool_()),
        ("ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("tracked", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Step:
    """One way to read a picture.

    Attributes:
        vision_depth: blocks of the vision tower that are run, 0..L_V.
        llm_depth: blocks of the language model that are run, 0..L; None reads the connector's output.
        lens: one of ``LENSES``; ``decoder`` goes with ``llm_depth`` None and only with it.
        norm_matched: scale the connector's features to their norm at the native depth.
    """

    vision_depth: int
    llm_depth: int | None
    lens: str = NORMED
    norm_matched: bool = False

    def __post_init__(self) -> None:
        accepted = (DECODER,) if self.llm_depth is None else LENSES
        if self.lens not in accepted:
            raise ValueError(
                f"lens={self.lens!r} does not go with llm_depth={self.llm_depth}; accepted are {', '.join(accepted)}."
            )

    @property
    def sort_key(self) -> tuple[int, int, str, bool]:
        """Order of the steps in tables: by depths, the connector first."""
        return self.vision_depth, -1 if self.llm_depth is None else self.llm_depth, self.lens, self.norm_matched


@dataclass(frozen=True, eq=False)
class DepthMaps:
    """Readings of one picture.

    Attributes:
        image: its name.
        geometry: where its N visual tokens look.
        steps: the S ways it was read.
        native_vision_depth: the vision depth that the model itself reads.
        ids: (S, N, k) int32 vocabulary ids, best first.
        log_probs: (S, N, k) float32.
        pieces: text of every id in `ids`, with its leading blank.
        words: the T tracked words.
        tracked: (S, N, T) float32 log-probabilities of the tracked words.
    """

    image: str
    geometry: TokenGeometry
    steps: tuple[Step, ...]
    native_vision_depth: int
    ids: np.ndarray
    log_probs: np.ndarray
    pieces: dict[int, str]
    words: tuple[str, ...] = ()
    tracked: np.ndarray | None = None

    def __post_init__(self) -> None:
        expected = (len(self.steps), len(self.geometry))
        if self.ids.ndim != 3 or self.ids.shape[:2] != expected or self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"ids and log_probs must be (steps, tokens, k) with (steps, tokens) = {expected}, got "
                f"{self.ids.shape} and {self.log_probs.shape}."
            )
        if self.tracked is not None and self.tracked.shape != (*expected, len(self.words)):
            raise ValueError(f"tracked must be {(*expected, len(self.words))}, got {self.tracked.shape}.")

    def position(self, step: Step) -> int:
        """Index of a step.

        Raises:
            ValueError: the picture was not read that way.
        """
        if step not in self.steps:
            raise ValueError(f"{self.image} was not read at {step}; it was at {len(self.steps)} others.")
        return self.steps.index(step)

    def to_table(self) -> pa.Table:
        """Rows with the columns of this module."""
        geometry = json.dumps(self.geometry.to_dict())
        tracked = np.zeros((*self.ids.shape[:2], 0), np.float32) if self.tracked is None else self.tracked
        rows = [
            {
                "image": self.image,
                "geometry": geometry,
                "vision_depth": step.vision_depth,
                "native": step.vision_depth == self.native_vision_depth,
                "llm_depth": step.llm_depth,
                "lens": step.lens,
                "norm_matched": step.norm_matched,
                "ids": self.ids[number].reshape(-1),
                "log_probs": self.log_probs[number].reshape(-1),
                "tracked": tracked[number].reshape(-1),
            }
            for number, step in enumerate(self.steps)
        ]
        facts = {b"native_vision_depth": str(self.native_vision_depth).encode()}
        facts |= {b"words": json.dumps(self.words).encode()}
        return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(facts))

    @classmethod
    def from_table(cls, table: pa.Table, pieces: dict[int, str]) -> DepthMaps:
        """Rebuild the readings of one picture from ``to_table``'s rows; `pieces` may hold more than is needed."""
        facts = table.schema.metadata
        rows = table.to_pydict()
        geometry = TokenGeometry.from_dict(json.loads(rows["geometry"][0]))
        shape, words = (table.num_rows, len(geometry), -1), tuple(json.loads(facts[b"words"]))
        keys = zip(rows["vision_depth"], rows["llm_depth"], rows["lens"], rows["norm_matched"], strict=True)

        def numbers(name: str, dtype: type) -> np.ndarray:
            return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(dtype)

        tracked = numbers("tracked", np.float32).reshape(shape) if words else None
        return cls(
            rows["image"][0],
            geometry,
            tuple(Step(*key) for key in keys),
            int(facts[b"native_vision_depth"]),
            numbers("ids", np.int32).reshape(shape),
            numbers("log_probs", np.float32).reshape(shape),
            pieces,
            words,
            tracked,
        )


def write_vocabulary(folder: Path, pieces: Sequence[str]) -> None:
    """Store the text of every vocabulary id, by position, beside the rows of a run."""
    with atomic_file(folder / VOCABULARY) as file:
        pq.write_table(pa.table({"piece": pa.array(pieces, pa.string())}), file, compression="zstd")


def read_vocabulary(folder: Path) -> dict[int, str]:
    """Return id -> text, as ``write_vocabulary`` stored it.

    Raises:
        ValueError: there is none.
    """
    if not (folder / VOCABULARY).is_file():
        raise ValueError(f"{folder} holds no {VOCABULARY}; give the output folder of `dualstream analyze what`.")
    return dict(enumerate(pq.read_table(folder / VOCABULARY).column("piece").to_pylist()))


def load_depth_maps(file: Path, pieces: dict[int, str]) -> DepthMaps:
    """Read the file of one picture, ``OUT/rows/UNIT.parquet``."""
    return DepthMaps.from_table(pq.read_table(file), pieces)
