"""Figures of a finished corpus, taken in constant memory, and the check that no row is lost or doubled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dualstream.processing import has_meaning, visible

from .depths import config_name
from .schema import Vocabulary
from .shards import ROW_GROUP, CorpusFolder

COLUMNS = ["index", "token_ids", "log_probs", "runs"]
FREQUENT_WORDS = 12


@dataclass
class Mean:
    """Mean over images, with its interval, from sums."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Add one value per image."""
        self.count += len(values)
        self.total += float(values.sum(dtype=np.float64))
        self.squares += float(np.square(values, dtype=np.float64).sum())

    def to_dict(self) -> dict[str, Any]:
        """``mean``, 95 % ``interval`` (normal approximation of the mean over images) and ``n`` images."""
        mean = self.total / self.count if self.count else math.nan
        variance = max(self.squares / self.count - mean**2, 0.0) if self.count else math.nan
        half = 1.96 * math.sqrt(variance / self.count) if self.count else math.nan
        return {"mean": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)], "n": self.count}


@dataclass
class DepthSurvey:
    """Figures of one depth.

    Attributes:
        tokens: visual tokens of an image.
        runs: runs as a share of tokens: what is left where neighbours that read alike are merged.
        probability: probability of the best reading.
        meaningless: share of tokens that read as punctuation, blanks or the like.
        agreement: share of tokens that read the same at the deepest depth.
        words: tokens per word.
    """

    tokens: Mean = field(default_factory=Mean)
    runs: Mean = field(default_factory=Mean)
    probability: Mean = field(default_factory=Mean)
    meaningless: Mean = field(default_factory=Mean)
    agreement: Mean = field(default_factory=Mean)
    words: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; words as the most frequent ones with their share of all tokens."""
        means = {name: value.to_dict() for name, value in vars(self).items() if isinstance(value, Mean)}
        total = sum(self.words.values())
        frequent = sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT_WORDS]
        return {**means, "words": {word: round(count / total, 4) for word, count in frequent}}


def survey(corpus: CorpusFolder, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """Take the figures of every depth.

    Args:
        corpus: a corpus of which all shards are finished.
        vocabulary: text of its ids.

    Returns:
        Part (``connector``, ``llm-5``, ...) -> figures.

    Raises:
        ValueError: if a shard's files do not hold the same pictures, each once and in order.
    """
    meaningless = np.array([not has_meaning(piece) for piece in vocabulary.pieces])
    results = {depth: DepthSurvey() for depth in corpus.depths}
    counts = {depth: np.zeros(len(vocabulary.pieces), np.int64) for depth in corpus.depths}
    last = -1
    for shard in range(corpus.num_shards or 0):
        files = [corpus.file(shard, depth) for depth in corpus.depths]
        for rows in zip(*(_batches(file) for file in files), strict=True):
            last = _check_order(files, [row["index"].to_numpy() for row in rows], last)
            best = [_best(row) for row in rows]
            for depth, row, ids in zip(corpus.depths, rows, best, strict=True):
                counts[depth] += np.bincount(ids, minlength=len(vocabulary.pieces))
                _add(results[depth], row, ids, best[-1], meaningless)
    for depth, result in results.items():
        for number in np.flatnonzero(counts[depth]).tolist():
            result.words[visible(vocabulary.pieces[number])] += int(counts[depth][number])
    return {config_name(depth): result.to_dict() for depth, result in results.items()}


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    return pq.ParquetFile(file).iter_batches(ROW_GROUP, columns=COLUMNS)


def _best(row: pa.RecordBatch) -> np.ndarray:
    """(tokens of all images,) the best id of every token."""
    ids = row["token_ids"].flatten()
    return ids.flatten().to_numpy().reshape(len(ids), -1)[:, 0]


def _add(result: DepthSurvey, row: pa.RecordBatch, ids: np.ndarray, deepest: np.ndarray, flags: np.ndarray) -> None:
    tokens = _lengths(row["token_ids"])
    log_probs = row["log_probs"].flatten().flatten().to_numpy().reshape(len(ids), -1)[:, 0]
    result.tokens.add(tokens)
    result.runs.add(_lengths(row["runs"]) / tokens)
    per_token = {"probability": np.exp(log_probs), "meaningless": flags[ids], "agreement": ids == deepest}
    starts = np.cumsum(tokens) - tokens
    for name, values in per_token.items():
        getattr(result, name).add(np.add.reduceat(values.astype(np.float64), starts) / tokens)


def _lengths(lists: pa.Array) -> np.ndarray:
    return np.diff(lists.offsets.to_numpy())


def _check_order(files: Sequence[Path], indices: Sequence[np.ndarray], last: int) -> int:
    """Check that all depths have the same pictures and that positions ascend; returns the last position."""
    same = all(np.array_equal(index, indices[0]) for index in indices[1:])
    if not same or (np.diff(indices[0], prepend=last) <= 0).any():
        names = ", ".join(file.name for file in files[:1])
        raise ValueError(f"{names}: the depths hold different pictures, or a picture twice or out of order.")
    return int(indices[0][-1]) if len(indices[0]) else last
