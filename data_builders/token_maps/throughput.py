"""How fast a corpus is built, against the forward passes that it cannot do without."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.measuring import median_ratio

from .build import OPENING_THREADS, BuildOptions, build_shards, open_corpus
from .images import SourceItem
from .pipeline import prepared_batches
from .sources import ImageSource

if TYPE_CHECKING:
    import torch

    from .depths import Depth
    from .reading import MapReader

FORWARD, BARE, BUILD = "forward", "bare", "build"
MODES = (FORWARD, BARE, BUILD)
#: wall: seconds on the clock; processor: of all threads; model_thread: processor seconds of the thread that runs the
#: model. Where cores are free for the other threads the build goes at the pace of the model's thread; on a busy
#: machine the clock on the wall says more about the neighbours.
CLOCKS = ("wall", "processor", "model_thread")


class FirstItems(ImageSource):
    """The first pictures of another source."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.source, self.name, self.split, self.license = source, source.name, source.split, source.license
        self.count = sum(1 for _ in islice(source.items(), count))

    def describe(self) -> dict[str, Any]:
        """See ``ImageSource``."""
        return {**self.source.describe(), "first": self.count}

    def items(self, start: int = 0) -> Iterator[SourceItem]:
        """See ``ImageSource``."""
        yield from islice(self.source.items(start), max((self.count or 0) - start, 0))


def measure_throughput(
    source: ImageSource, reader: MapReader, options: BuildOptions, images: int = 320, rounds: int = 10
) -> dict[str, Any]:
    """Time three ways through the same pictures, in turns within one process.

    ``forward``: the vision tower, the connector and the language model up to the deepest depth, on batches that were
    prepared before; nothing else. ``bare``: the same after opening the pictures and running the processor, in threads
    ahead of the model as a build does. ``build``: the whole build, with hashes, readings, Parquet and records on disk.

    Args:
        source: the pictures; the first `images` are used.
        reader: the model.
        options: batches and shards.
        images: pictures per round.
        rounds: measured rounds, after one that is not; the order of the three changes from round to round.

    Returns:
        Pictures, rounds, median pictures per second of every way, and the speed of ``build`` as a share of the other
        two by every one of `CLOCKS`: the median over rounds with its 95 % bootstrap interval, and the range.
    """
    part = FirstItems(source, images)
    ways = ways_through(part, reader, options)
    seconds: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for number in range(-1, rounds):
        for place in range(len(MODES)):
            mode = MODES[(number + place) % len(MODES)]
            timing = _timed(ways[mode])
            if number >= 0:
                seconds[mode].append(timing)
    times = {mode: dict(zip(CLOCKS, np.array(timings).T, strict=True)) for mode, timings in seconds.items()}
    return {
        "images": part.count,
        "rounds": rounds,
        "images_per_second": {
            mode: round(float((part.count or 0) / np.median(times[mode]["wall"])), 2) for mode in MODES
        },
        "build_speed_as_share_of": {
            other: {clock: _ratio(times[other][clock], times[BUILD][clock]) for clock in CLOCKS}
            for other in (BARE, FORWARD)
        },
        "seconds": {mode: [[round(value, 3) for value in timing] for timing in seconds[mode]] for mode in MODES},
    }


def ways_through(source: ImageSource, reader: MapReader, options: BuildOptions) -> dict[str, Callable[[], None]]:
    """The three ways of ``measure_throughput`` through all pictures of a source, as functions to time."""
    batches = [batch.inputs for batch in _batches(source, reader, options) if batch.inputs is not None]
    return {
        FORWARD: lambda: _run([*batches], reader),
        BARE: lambda: _run((batch.inputs for batch in _batches(source, reader, options)), reader),
        BUILD: lambda: _build(source, reader, options),
    }


def describe_throughput(figures: dict[str, Any]) -> str:
    """Throughput figures as a line per comparison."""
    speeds = ", ".join(f"{mode} {speed:.1f}" for mode, speed in figures["images_per_second"].items())
    lines = [f"images per second (median of {figures['rounds']} rounds of {figures['images']}): {speeds}"]
    for other, clocks in figures["build_speed_as_share_of"].items():
        for clock, share in clocks.items():
            low, high = share["interval"]
            lines.append(
                f"build / {other}, {clock.replace('_', ' ')} time: {share['median']:.3f} [{low:.3f}, {high:.3f}], "
                f"range {share['min']:.3f} to {share['max']:.3f}"
            )
    return "\n".join(lines)


def _batches(source: ImageSource, reader: MapReader, options: BuildOptions) -> Iterator[Any]:
    limits = options.batch_size, options.rows_per_shard, OPENING_THREADS
    return prepared_batches(source.items(), reader, *limits, hashed=False)


def _run(batches: Any, reader: MapReader) -> None:
    """Run the model on prepared batches and do nothing with what it says."""

    def ignore(depth: Depth, states: torch.Tensor) -> None:
        pass

    with _without_norm(reader):
        for inputs in batches:
            if inputs is not None:
                reader.forward(inputs, ignore)


@contextmanager
def _without_norm(reader: MapReader) -> Iterator[None]:
    """Leave the norm before the readings to the build."""
    final_norm, reader.final_norm = reader.final_norm, False
    try:
        yield
    finally:
        reader.final_norm = final_norm


def _build(source: ImageSource, reader: MapReader, options: BuildOptions) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_shards(source, reader, open_corpus(source, reader, options, Path(folder)))


def _timed(function: Callable[[], None]) -> list[float]:
    """Seconds by every one of `CLOCKS`."""
    before = time.perf_counter(), time.process_time(), time.thread_time()
    function()
    after = time.perf_counter(), time.process_time(), time.thread_time()
    return [end - start for start, end in zip(before, after, strict=True)]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
    """Median ratio over rounds with its bootstrap interval, and the range."""
    found, ratios = median_ratio(numerator, denominator), numerator / denominator
    values = {"median": found["value"], "min": ratios.min(), "max": ratios.max()}
    return {
        **{name: round(float(value), 4) for name, value in values.items()},
        "interval": [round(found[end], 4) for end in ("low", "high")],
    }
