"""Compare two corpora row by row: ``python -m dualstream.data_builders.token_maps.compare A B``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .shards import file_sha256

SHOWN = 20
ROWS_AT_A_TIME = 256


@dataclass
class CorpusComparison:
    """How two corpora differ.

    Attributes:
        rows: rows that both have, by part (``connector``, ``llm-5``, ...).
        files: data files that either has.
        identical_files: data files of equal names and bytes.
        differences: number of differences.
        examples: the first of them, in words.
    """

    rows: dict[str, int] = field(default_factory=dict)
    files: int = 0
    identical_files: int = 0
    differences: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether there is no difference; the shards may be cut differently all the same."""
        return self.differences == 0

    def note(self, difference: str) -> None:
        """Count a difference."""
        self.differences += 1
        if len(self.examples) < SHOWN:
            self.examples.append(difference)


def compare_corpora(a: Path, b: Path, atol: float = 0.0) -> CorpusComparison:
    """Compare every row of two corpora, whatever shards they are cut into, in constant memory.

    A row that only one has, a row that comes twice or out of order, a value that differs and different rejects are
    differences.

    Args:
        a: folder of a corpus.
        b: folder of another.
        atol: allowed absolute difference of log-probabilities; everything else must be equal.

    Raises:
        ValueError: if a folder holds no data files.
    """
    left, right = data_files(a), data_files(b)
    both = left.keys() & right.keys()
    result = CorpusComparison(files=len(left.keys() | right.keys()))
    result.identical_files = sum(file_sha256(left[name]) == file_sha256(right[name]) for name in both)
    parts = {name.split("/")[1] for name in left}, {name.split("/")[1] for name in right}
    for part in sorted(parts[0] ^ parts[1]):
        result.note(f"only one corpus has {part}")
    for part in sorted(parts[0] & parts[1]):
        result.rows[part] = _compare_part(part, _Rows(part, left, result), _Rows(part, right, result), atol, result)
    if _rejects(a) != _rejects(b):
        result.note("the rejects differ")
    return result


def data_files(folder: Path) -> dict[str, Path]:
    """Return the data files of a corpus by their relative names, sorted.

    Raises:
        ValueError: if there are none.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("data/*/*.parquet"))}
    if not files:
        raise ValueError(f"{folder} holds no corpus: there are no files data/*/*.parquet.")
    return files


class _Rows:
    """The rows of one part of a corpus, as a stream of record batches that can be taken in pieces."""

    def __init__(self, part: str, files: dict[str, Path], result: CorpusComparison) -> None:
        self.part, self.result, self.last = part, result, -1
        self.batches = self._read([path for name, path in files.items() if name.split("/")[1] == part])
        self.batch: pa.RecordBatch | None = None
        self.advance(0)

    def _read(self, files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        for path in files:
            yield from pq.ParquetFile(path).iter_batches(ROWS_AT_A_TIME)

    @property
    def index(self) -> np.ndarray:
        """Positions of the rows at hand; empty at the end."""
        return np.zeros(0, np.int64) if self.batch is None else self.batch["index"].to_numpy()

    def advance(self, rows: int) -> None:
        """Leave `rows` rows behind; fetches the next batch when this one is used up."""
        if self.batch is not None and rows < len(self.batch):
            self.batch = self.batch.slice(rows)
            return
        self.batch = next((batch for batch in self.batches if len(batch)), None)
        if self.batch is not None:
            steps = np.diff(self.index, prepend=self.last)
            for row in self.index[steps <= 0].tolist():
                self.result.note(f"{self.part}: row {row} comes twice or out of order")
            self.last = int(self.index[-1])


def _compare_part(part: str, left: _Rows, right: _Rows, atol: float, result: CorpusComparison) -> int:
    """Walk through both streams at once; returns the rows that both have."""
    common = 0
    while left.batch is not None or right.batch is not None:
        a, b = left.index, right.index
        shared = min(len(a), len(b))
        unequal = np.flatnonzero(a[:shared] != b[:shared])
        rows = int(unequal[0]) if len(unequal) else shared
        if rows and left.batch is not None and right.batch is not None:
            _compare_rows(part, left.batch.slice(0, rows), right.batch.slice(0, rows), atol, result)
            common += rows
            left.advance(rows)
            right.advance(rows)
        elif not len(b) or (len(a) and a[0] < b[0]):
            result.note(f"{part}: only the first corpus has row {a[0]}")
            left.advance(1)
        else:
            result.note(f"{part}: only the second corpus has row {b[0]}")
            right.advance(1)
    return common


def _compare_rows(part: str, a: pa.RecordBatch, b: pa.RecordBatch, atol: float, result: CorpusComparison) -> None:
    """Compare rows of equal positions, column by column and, where a column differs, row by row."""
    if a.schema.names != b.schema.names:
        result.note(f"{part}: the columns differ")
        return
    for name in a.schema.names:
        if a[name].equals(b[name]):
            continue
        for row, index in enumerate(a["index"].to_pylist()):
            if not _equal(a[name][row], b[name][row], atol if name == "log_probs" else 0.0):
                result.note(f"{part}: row {index} differs in {name}")


def _equal(a: pa.Scalar, b: pa.Scalar, atol: float) -> bool:
    if atol == 0.0 or a.equals(b):
        return bool(a.equals(b))
    first, second = np.asarray(a.as_py()), np.asarray(b.as_py())
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=0.0, atol=atol))


def _rejects(folder: Path) -> str | None:
    path = folder / "rejects.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else None


def main(argv: list[str] | None = None) -> int:
    """Print the comparison as JSON; the exit status is 0 if the corpora are equal."""
    parser = argparse.ArgumentParser(prog="python -m dualstream.data_builders.token_maps.compare")
    parser.add_argument("a", type=Path, help="folder of a corpus")
    parser.add_argument("b", type=Path, help="folder of another")
    parser.add_argument("--atol", type=float, default=0.0, help="allowed difference of log-probabilities")
    result = compare_corpora(**vars(parser.parse_args(argv)))
    print(json.dumps({"equal": result.equal, **asdict(result)}))
    return 0 if result.equal else 1


if __name__ == "__main__":
    sys.exit(main())
