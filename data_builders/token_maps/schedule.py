"""Which pictures a process still has to read: its share of the shards, less those that are finished."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from .images import SourceItem
from .shards import CorpusFolder
from .sources import ImageSource


@dataclass(frozen=True)
class Share:
    """The part of the shards that one of several processes makes: every `workers`-th, from `worker` on."""

    workers: int = 1
    worker: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"shard={self.worker} must lie within 0..{self.workers - 1}, below num_shards.")

    @classmethod
    def from_environment(cls, workers: int = 1, worker: int = 0) -> Share:
        """Split a share further among the processes of `torchrun` or `accelerate launch` (RANK, WORLD_SIZE)."""
        outer = cls(workers, worker)
        inner = cls(int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))
        return cls(outer.workers * inner.workers, outer.worker * inner.workers + inner.worker)


class Schedule:
    """The work of one process on a corpus.

    Attributes:
        skipped: shards of the share that were finished before.
        total: pictures to read; None while the length of the source is unknown.

    Args:
        source: the pictures; where it knows their number, the corpus notes it.
        corpus: the folder with the finished shards.
        share: the process's share.
    """

    def __init__(self, source: ImageSource, corpus: CorpusFolder, share: Share) -> None:
        self.source, self.corpus, self.share, self.rows = source, corpus, share, corpus.rows_per_shard
        self.skipped = 0
        self.total: int | None = None
        if source.count is not None:
            corpus.set_count(source.count)
        if corpus.num_shards is not None and corpus.count is not None:
            self.wanted = [
                shard for shard in range(share.worker, corpus.num_shards, share.workers) if self._open(shard)
            ]
            self.total = sum(min(self.rows, corpus.count - shard * self.rows) for shard in self.wanted)

    def items(self) -> Iterator[SourceItem]:
        """Yield the pictures to be read, by position; shards are complete."""
        yield from self._streamed() if self.total is None else self._known()

    def _known(self) -> Iterator[SourceItem]:
        if not self.wanted:
            return
        start, end = self.wanted[0] * self.rows, (self.wanted[-1] + 1) * self.rows
        wanted = set(self.wanted)
        for item in islice(self.source.items(start), end - start):
            if item.index // self.rows in wanted:
                yield item

    def _streamed(self) -> Iterator[SourceItem]:
        """Read the source to its end, which tells its length; the pictures of other processes stay unopened."""
        first = next(shard for shard in count(self.share.worker, self.share.workers) if self._open(shard))
        position = self._position_before(first)
        if position is None:
            return
        wanted: dict[int, bool] = {first: True}
        for item in self.source.items(position):
            shard, position = item.index // self.rows, item.index + 1
            if shard % self.share.workers == self.share.worker and shard >= first:
                if shard not in wanted:
                    wanted = {shard: self._open(shard)}
                if wanted[shard]:
                    yield item
        self.corpus.set_count(position)

    def _position_before(self, shard: int) -> int | None:
        """Where to begin before an unfinished shard of a source of unknown length; None if it has ended before.

        Everything up to the end of the share's shard before it was there once, so that counting can go on from there.
        """
        before = shard - self.share.workers
        record = self.corpus.record(before) if before >= 0 else None
        if record is None:
            return 0
        positions = record["images"] + len(record["rejects"])
        if positions == self.rows:
            return (before + 1) * self.rows
        self.corpus.set_count(before * self.rows + positions)
        return None

    def _open(self, shard: int) -> bool:
        """Whether a shard has to be made; counts those that have not."""
        finished = self.corpus.record(shard) is not None
        self.skipped += finished
        return not finished
