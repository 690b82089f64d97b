"""The headline: how far compressed answers are from a model that is given the short prompt natively."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dualstream.modeling import VisualDecoder

from .forced_map import build_decoder, kept_cells
from .measuring import Clock, against, count_work, interleaved, peak_bytes, timing
from .prefill import FULL, LIMIT, OURS, Way, compressed, feature_grids, native_short, uncompressed
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
                "speedup": against(seconds[FULL], seconds[name], name),
                **_work(way, clock),
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


def _work(way: Way, clock: Clock) -> Row:
    """Bytes and counts of one more run."""
    prefill = way()
    found: Row = {"kv_bytes": prefill.kv_bytes, "prompt_length": prefill.length}
    del prefill
    found["peak_bytes"] = peak_bytes(way, clock.device)
    counts = count_work(way, flops=False)
    return {**found, "operations": counts.operations, "waits": counts.waits}
