"""The headline: how far compressed answers are from a model that is given the short prompt natively."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dualstream.measuring import Clock, against, count_work, interleaved, median_ratio, peak_bytes, timing
from dualstream.modeling import VisualDecoder

from .forced_map import build_decoder, kept_cells
from .prefill import FULL, LIMIT, OURS, Prefill, Way, compressed, feature_grids, native_short, uncompressed
from .workload import Inputs

Row = dict[str, Any]
CONTROL = "native short, again"


def run(
    model: Any,
    inputs: Inputs,
    reductions: Sequence[float],
    decoders: Sequence[str],
    rounds: int,
    clock: Clock,
    progress: Callable[[], Any] | None = None,
) -> list[Row]:
    """Time the first token of every way at every reduction rate.

    In every round, the whole prompt, the short prompt twice (the second is a control: what the ratio of two equal
    things looks like on this machine) and the compressed prompt with each decoder run in random order.

    Args:
        model: a stock model.
        inputs: of a batch.
        reductions: shares of visual tokens to remove.
        decoders: kinds, see ``forced_map.build_decoder``.
        rounds: per reduction rate.
        clock: of the device.
        progress: called after every run.

    Returns:
        A row per way and reduction, with its ratios to the limit and to the whole prompt.
    """
    grids = feature_grids(model, inputs)
    readers = {kind: build_decoder(kind, model) for kind in decoders}
    rows = []
    for reduction in reductions:
        ways = ways_to_first_token(model, inputs, reduction, readers, grids)
        seconds = interleaved(ways, rounds, clock=clock, progress=progress)
        for name, way in ways.items():
            kept = int(grids.prod(-1).sum() if name == FULL else kept_cells(grids, reduction).sum())
            row = {
                "suite": "headline",
                "way": name,
                "decoder": name.partition(", ")[2] if name.startswith(OURS) else None,
                "reduction": reduction,
                **batch_facts(inputs, grids, kept),
                **timing(seconds[name]),
                **against(seconds[name], seconds[LIMIT], LIMIT),
                "speedup": median_ratio(seconds[FULL], seconds[name]),
                **work_facts(way, clock),
            }
            rows.append(row)
    return rows


def ways_to_first_token(
    model: Any, inputs: Inputs, reduction: float, readers: dict[str, VisualDecoder], grids: torch.Tensor
) -> dict[str, Way]:
    """The ways by name: the whole prompt, the limit, the limit again, and ours with every decoder."""
    limit = native_short(model, inputs, reduction, grids)
    ours = {
        f"{OURS}, {kind}": compressed(model, inputs, reduction, decoder, grids) for kind, decoder in readers.items()
    }
    return {FULL: uncompressed(model, inputs), LIMIT: limit, CONTROL: limit, **ours}


def batch_facts(inputs: Inputs, grids: torch.Tensor, kept: int) -> Row:
    """Sizes of a batch as columns of a row."""
    batch, cells = len(inputs["input_ids"]), int(grids.prod(-1).sum())
    return {
        "batch": batch,
        "prompt_tokens": int(inputs["attention_mask"].sum()),
        "visual_tokens": cells,
        "kept_tokens": kept,
    }


def describe(rows: Sequence[Row]) -> str:
    """A line per way, batch and reduction rate, for people."""
    lines = []
    for row in rows:
        size = f"batch {row['batch']}, {row['visual_tokens']} -> {row['kept_tokens']} visual tokens"
        ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}] x {row['ratio_to']}"
        lines.append(f"{row['reduction']:.0%} fewer, {size}: {row['way']:<22} {row['median_ms']:10.1f} ms  {ratio}")
    return "\n".join(lines)


def work_facts(way: Way, clock: Clock) -> Row:
    """Bytes and counts of one more run (on an accelerator two: its own statistics know the peak better)."""
    prefills: list[Prefill] = []
    counts = count_work(lambda: prefills.append(way()))
    prefill = prefills.pop()
    found = {"kv_bytes": prefill.kv_bytes, "prompt_length": prefill.length}
    del prefill
    peak = counts.peak_bytes if clock.device.type == "cpu" else peak_bytes(way, clock.device)
    return {
        **found,
        "peak_bytes": peak,
        "flops": counts.flops,
        "operations": counts.operations,
        "waits": counts.waits,
    }
