"""From a source to batches that are ready for the model, opened and prepared in threads ahead of it.

What goes into a batch depends on the pictures of one shard and nothing else: not on threads, on other workers, or on
where a killed build is taken up. So a shard that is made again is the same bit by bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from .images import ImageFacts, Opened, Reject, SourceItem, open_item

if TYPE_CHECKING:
    from dualstream.processing import TokenGeometry

    from .reading import MapReader

T = TypeVar("T")
U = TypeVar("U")
WAITING_BATCHES = 4  # pictures that wait for others of their grids fill at most this many batches
PREPARED_AHEAD = 2


@dataclass
class Shard:
    """One shard in the making: pictures in the order of the source, and those that could not be read."""

    number: int
    images: list[ImageFacts] = field(default_factory=list)
    geometries: list[TokenGeometry] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class Member:
    """An opened picture and its place among the readable pictures of its shard."""

    place: int
    opened: Opened
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """Pictures of equal grids, prepared for the model.

    Attributes:
        shard: the shard they belong to.
        places: (B,) their places among its readable pictures.
        inputs: what the processor made of them; None at the end of the shard, with no places.
    """

    shard: Shard
    places: list[int]
    inputs: Any


def prepared_batches(
    items: Iterable[SourceItem],
    reader: MapReader,
    batch_size: int,
    rows_per_shard: int,
    threads: int,
    hashed: bool = True,
) -> Iterator[Batch]:
    """Open, group and prepare pictures ahead of whoever takes the batches.

    Args:
        items: pictures by ascending position; the shards they fall into must be complete, up to the source's end.
        reader: prepares them.
        batch_size: pictures per batch at most.
        rows_per_shard: positions per shard.
        threads: threads that open pictures; one more prepares batches, in order.
        hashed: hash the pixels.

    Yields:
        The batches of a shard and, after them, one without inputs: the shard is complete.
    """
    with ThreadPoolExecutor(threads) as openers, ThreadPoolExecutor(1) as preparer:
        opened = prefetched(items, partial(open_item, hashed=hashed), openers, ahead=batch_size)
        groups = _groups(opened, reader, batch_size, rows_per_shard)
        yield from prefetched(groups, partial(_prepared, reader), preparer, ahead=PREPARED_AHEAD)


def prefetched(items: Iterable[T], function: Callable[[T], U], pool: Executor, ahead: int) -> Iterator[U]:
    """Map a function over items in a pool, in order, at most `ahead` results before they are asked for."""
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def form_batches(members: Iterable[Member], batch_size: int, max_waiting: int | None = None) -> Iterator[list[Member]]:
    """Group pictures of equal grids.

    Args:
        members: pictures in order.
        batch_size: pictures per batch at most.
        max_waiting: pictures held back at most; when there are more, the fullest group goes as it is. Default
            `WAITING_BATCHES` batches.

    Yields:
        Every picture in exactly one batch; all pictures of a batch have the same grids, in order.
    """
    max_waiting = WAITING_BATCHES * batch_size if max_waiting is None else max_waiting
    groups: dict[Any, list[Member]] = {}
    for member in members:
        group = groups.setdefault(member.grids, [])
        group.append(member)
        if len(group) == batch_size:
            yield groups.pop(member.grids)
        elif sum(map(len, groups.values())) > max_waiting:
            fullest = max(groups, key=lambda grids: len(groups[grids]))  # of equals the one that waits longest
            yield groups.pop(fullest)
    yield from groups.values()


def _groups(
    opened: Iterable[Opened | Reject], reader: MapReader, batch_size: int, rows_per_shard: int
) -> Iterator[tuple[Shard, list[Member]]]:
    """Yield the shard and members of every batch, and an empty batch at the end of every shard."""

    def shard_of(picture: Opened | Reject) -> int:
        return (picture.index if isinstance(picture, Reject) else picture.facts.index) // rows_per_shard

    for number, pictures in groupby(opened, key=shard_of):
        shard = Shard(number)
        for members in form_batches(_members(shard, pictures, reader), batch_size):
            yield shard, members
        yield shard, []


def _members(shard: Shard, pictures: Iterable[Opened | Reject], reader: MapReader) -> Iterator[Member]:
    """Enter pictures into their shard; yield those that the model can read."""
    for picture in pictures:
        if isinstance(picture, Reject):
            shard.rejects.append(picture)
            continue
        facts = picture.facts
        try:
            geometry = reader.geometry(facts.size)
        except ValueError as error:  # a size that the processor refuses
            shard.rejects.append(Reject(facts.index, facts.source_id, str(error)))
            continue
        shard.images.append(facts)
        shard.geometries.append(geometry)
        yield Member(len(shard.images) - 1, picture, tuple(geometry.grids))


def _prepared(reader: MapReader, group: tuple[Shard, list[Member]]) -> Batch:
    shard, members = group
    inputs = reader.prepare([member.opened.image for member in members]) if members else None
    return Batch(shard, [member.place for member in members], inputs)
