"""Build a corpus: read every picture of a source, shard by shard, and take up a build that was killed."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .depths import Depth
from .pipeline import Batch, Shard, prepared_batches
from .schedule import Schedule, Share
from .schema import MapReading, shard_table
from .shards import CorpusFolder

if TYPE_CHECKING:
    import torch

    from .reading import MapReader
    from .sources import ImageSource

FORMAT_VERSION = 1
OPENING_THREADS = min(4, os.cpu_count() or 1)
STATES_IN_FLIGHT = 2  # depths of which the states wait to be read

Readings = tuple[np.ndarray, np.ndarray]  # ids and log-probabilities of a batch at one depth


@dataclass(frozen=True)
class BuildOptions:
    """How a corpus is cut into batches and shards.

    Attributes:
        batch_size: pictures per forward pass.
        rows_per_shard: pictures per shard, rows of each of its files.
    """

    batch_size: int = 16
    rows_per_shard: int = 1000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass
class BuildReport:
    """What one process did.

    Attributes:
        shards: shards made.
        skipped: shards of its share that were finished before.
        images: pictures read.
        rejected: pictures that could not be read.
    """

    shards: int = 0
    skipped: int = 0
    images: int = 0
    rejected: int = 0


def configuration(source: ImageSource, reader: MapReader, options: BuildOptions) -> dict[str, Any]:
    """Everything that decides a row of the corpus, as JSON values."""
    facts = {"format": FORMAT_VERSION, "source": source.describe(), "split": source.split}
    return {**facts, **reader.describe(), **asdict(options)}


def open_corpus(source: ImageSource, reader: MapReader, options: BuildOptions, out: Path) -> CorpusFolder:
    """Begin a corpus in a folder, or take up the one that was begun there with the same configuration.

    Raises:
        ValueError: if the folder holds anything else, or lies within a folder of images that is the source.
    """
    folder = getattr(source, "folder", None)
    if folder is not None and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={out} lies within the source {folder}: its figures would become images of the source.")
    return CorpusFolder(out, configuration(source, reader, options), source.split)


def build_shards(
    source: ImageSource, reader: MapReader, corpus: CorpusFolder, share: Share | None = None
) -> BuildReport:
    """Make the shards of a share that are not finished yet.

    Args:
        source: the pictures.
        reader: reads them.
        corpus: where they go; its configuration must be of this source and reader.
        share: default all shards.

    Returns:
        What was done. Pictures that cannot be read are noted in their shard's record and left out.
    """
    schedule = Schedule(source, corpus, share or Share())
    with (
        _Maker(reader, corpus) as maker,
        tqdm(total=schedule.total, desc="token maps", unit="image", disable=None) as bar,
    ):
        options = maker.batch_size, corpus.rows_per_shard, OPENING_THREADS
        for batch in prepared_batches(schedule.items(), reader, *options):
            maker.take(batch)
            bar.update(len(batch.places))
    maker.report.skipped = schedule.skipped
    return maker.report


class _Maker:
    """Runs the model on batches; in threads beside it, the readings are made and finished shards are written.

    Leaving its context waits for what is still to be written.
    """

    def __init__(self, reader: MapReader, corpus: CorpusFolder) -> None:
        self.reader, self.corpus, self.report = reader, corpus, BuildReport()
        self.batch_size: int = corpus.configuration["batch_size"]
        self.readers, self.writers = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.read: list[tuple[Depth, list[int], Future[Readings]]] = []  # of the shard in the making
        self.unread: deque[Future[Readings]] = deque()
        self.unwritten: deque[Future[None]] = deque()

    def __enter__(self) -> _Maker:
        return self

    def __exit__(self, *error: object) -> None:
        with self.readers, self.writers:
            while self.unwritten and not any(error):
                self.unwritten.popleft().result()

    def take(self, batch: Batch) -> None:
        """Read a batch; at the end of a shard, have it written."""
        if batch.inputs is None:
            self._finish(batch.shard)
            return

        def visit(depth: Depth, states: torch.Tensor) -> None:
            while len(self.unread) >= STATES_IN_FLIGHT:
                self.unread.popleft().result()
            self.unread.append(self.readers.submit(self.reader.read, depth, states))
            self.read.append((depth, batch.places, self.unread[-1]))

        grids = self.reader.forward(batch.inputs, visit)
        expected = [grid for place in batch.places for grid in batch.shard.geometries[place].grids]
        if grids.tolist() != [list(grid) for grid in expected]:
            raise ValueError(
                f"the model makes feature blocks of {grids.tolist()}, its processor's geometry {expected}."
            )

    def _finish(self, shard: Shard) -> None:
        read, self.read = self.read, []
        while self.unwritten:
            self.unwritten.popleft().result()  # at most one shard waits in memory
        self.unwritten.append(self.writers.submit(self._write, shard, read))
        self.report.shards += 1
        self.report.images += len(shard.images)
        self.report.rejected += len(shard.rejects)

    def _write(self, shard: Shard, read: list[tuple[Depth, list[int], Future[Readings]]]) -> None:
        source = hashlib.sha256("".join(f"{i.source_id}\0{i.image_hash}\n" for i in shard.images).encode()).hexdigest()
        tables = self._tables(shard, read)
        self.corpus.write(shard.number, tables, [asdict(reject) for reject in shard.rejects], source)

    def _tables(
        self, shard: Shard, read: list[tuple[Depth, list[int], Future[Readings]]]
    ) -> Iterator[tuple[Depth, pa.Table]]:
        """Yield the table of every depth, rows in the order of the source."""
        for depth in self.reader.depths:
            parts: dict[int, Readings] = {}
            for places, future in ((places, future) for at, places, future in read if at == depth):
                ids, log_probs = (values.reshape(len(places), -1, self.reader.top_k) for values in future.result())
                parts |= {place: (ids[row], log_probs[row]) for row, place in enumerate(places)}
            readings = [
                MapReading(facts, geometry, *parts[place])
                for place, (facts, geometry) in enumerate(zip(shard.images, shard.geometries, strict=True))
            ]
            yield (
                depth,
                shard_table(readings, self.reader.provenance(depth), self.reader.vocabulary, self.reader.top_k),
            )
