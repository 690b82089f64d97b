"""Time, memory and counts of work: what every measurement here is made with."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

RESAMPLES = 2000
MILLISECONDS = 1000
# Operations whose result's shape or value the host must know: on an accelerator each waits for the device.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "_unique2")


class Clock:
    """Times a function on a device.

    On an accelerator, events on its stream are used and the host waits only after the last of them; on a CPU, the
    wall clock.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @staticmethod
    def now() -> float:
        """Seconds on the wall clock."""
        return time.perf_counter()

    def seconds(self, function: Callable[[], Any]) -> float:
        """Run a function once and return how long it took, all work it queued on the device included."""
        if self.device.type == "cpu":
            start = self.now()
            function()
            return self.now() - start
        backend: Any = torch.get_device_module(self.device)
        backend.synchronize(self.device)
        first, last = backend.Event(enable_timing=True), backend.Event(enable_timing=True)
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / MILLISECONDS


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Clock | None = None,
    seed: int = 0,
    progress: Callable[[], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Time several ways of doing something in turns, in another order in every round.

    Whatever slows the machine for a while then slows all ways alike.

    Args:
        ways: what to time, by name.
        rounds: measured rounds.
        warmup: rounds before them that are not counted.
        clock: see ``Clock``; the CPU's if None.
        seed: of the orders.
        progress: called after every run.

    Returns:
        (rounds,) float64 seconds of every way.

    Raises:
        ValueError: there are fewer than two rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds} must be at least 2: one round has no spread")
    clock, names = clock or Clock(), list(ways)
    rng = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for index in rng.permutation(len(names)):
            elapsed = clock.seconds(ways[names[index]])
            if number >= 0:
                seconds[names[index]].append(elapsed)
            if progress is not None:
                progress()
    return {name: np.array(values) for name, values in seconds.items()}


def repeated(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return a function that calls another so often in a row: what takes well under a millisecond is timed so."""

    def run() -> None:
        for _ in range(times):
            function()

    return run


def median_ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Median of the ratios of paired rounds.

    Args:
        numerator: (rounds,) positive.
        denominator: (rounds,) positive, of the same rounds.
        seed: of the bootstrap.

    Returns:
        ``value``, its bootstrap 95 % interval ``low`` and ``high``, and ``quartile_1`` and ``quartile_3`` of the
        rounds.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if numerator.shape != denominator.shape or numerator.ndim != 1 or not numerator.size:
        raise ValueError(f"numerator {numerator.shape} and denominator {denominator.shape} must pair rounds")
    ratios = numerator / denominator
    rng = np.random.default_rng(seed)
    medians = np.median(ratios[rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    first, third = np.percentile(ratios, [25, 75])
    found = {"value": np.median(ratios), "low": low, "high": high, "quartile_1": first, "quartile_3": third}
    return {name: float(value) for name, value in found.items()}


def timing(seconds: np.ndarray) -> dict[str, float | int]:
    """Median and quartiles in milliseconds, as columns of a row."""
    first, middle, third = np.percentile(seconds, [25, 50, 75]) * MILLISECONDS
    return {"median_ms": float(middle), "q1_ms": float(first), "q3_ms": float(third), "rounds": len(seconds)}


def against(seconds: np.ndarray, other: np.ndarray, name: str) -> dict[str, Any]:
    """Ratio to another way with its interval, as columns of a row."""
    found = median_ratio(seconds, other)
    return {"ratio": found["value"], "ratio_low": found["low"], "ratio_high": found["high"], "ratio_to": name}


@dataclass
class WorkCounts:
    """Work that a function does; equal on every machine, unlike its time.

    Attributes:
        operations: tensor operations that were dispatched; on an accelerator about one kernel each.
        waits: those that make the host wait for the device, see ``WAITING``.
        flops: of matrix products and attention, two per multiply-add.
        peak_bytes: most bytes of tensors alive at once that the function made.
        by_name: operations by name.
    """

    operations: int = 0
    waits: int = 0
    flops: int = 0
    peak_bytes: int = 0
    by_name: Counter[str] = field(default_factory=Counter)


def count_work(function: Callable[[], Any], flops: bool = True) -> WorkCounts:
    """Run a function once and count what it does.

    Args:
        function: is run without gradients.
        flops: whether to count them too.
    """
    counts, flop_mode = _Counter(), FlopCounterMode(display=False)
    with torch.no_grad(), flop_mode if flops else nullcontext(), counts:
        function()
    found = counts.counts
    found.flops = flop_mode.get_total_flops() if flops else 0
    return found


def peak_bytes(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes alive at once that a function allocates beyond what was there, measured in one run of its own."""
    device = torch.device(device)
    gc.collect()
    if device.type == "cpu":
        return count_work(function, flops=False).peak_bytes
    backend: Any = torch.get_device_module(device)
    backend.synchronize(device)
    backend.reset_peak_memory_stats(device)
    before = backend.memory_allocated(device)
    with torch.no_grad():
        function()
    backend.synchronize(device)
    return backend.max_memory_allocated(device) - before


class _Counter(TorchDispatchMode):
    """Counts operations, and bytes of the tensors they return as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self._live = WorkCounts(), 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.counts.by_name[name] += 1
        self.counts.operations += 1
        self.counts.waits += name in WAITING or _selects(name, args) or _leaves_device(name, args, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:  # a view, or written in place
            return
        self._known.add(key)
        self._live += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _leaves_device(name: str, args: Any, result: Any) -> bool:
    """Whether a tensor is copied from an accelerator to the CPU."""
    return name == "_to_copy" and args[0].device.type != "cpu" and result.device.type == "cpu"


def _selects(name: str, args: Any) -> bool:
    """Whether an indexing takes a boolean mask, whose number of true values the host must know."""
    masks = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(isinstance(mask, torch.Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
