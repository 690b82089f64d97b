"""The product's own tensor operations by themselves: plan, pool and rewrite, for pictures of two sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dualstream.measuring import Clock, count_work, interleaved, repeated, timing
from dualstream.modeling import CompressionConfig, run_length_plan
from dualstream.modeling.prompt_plan import plan_prompt
from dualstream.modeling.visual_compression import merge_features

from .forced_map import forced_ids

Row = dict[str, Any]
#: Grids of a LLaVA-1.5 picture and of the largest picture in the papers' budget for Qwen2.5-VL.
GRIDS = ((24, 24), (32, 40))
BATCHES = (1, 8)
REDUCTION = 0.49
WIDTH, VOCABULARY, TEXT_TOKENS = 3584, 152_064, 48
REPEATS = 10  # one call takes well under a millisecond
IMAGE_TOKEN = VOCABULARY - 1


def run(rounds: int, clock: Clock, progress: Callable[[], Any] | None = None) -> list[Row]:
    """Time plan, pool and rewrite on forced maps of ``GRIDS`` x ``BATCHES``.

    Args:
        rounds: of every operation, interleaved.
        clock: of the device.
        progress: called after every run.

    Returns:
        A row per operation, size of picture and batch; times are those of one call.
    """
    cases = {(grid, batch): _operations(grid, batch, clock.device) for grid in GRIDS for batch in BATCHES}
    ways = {(name, *case): way for case, operations in cases.items() for name, way in operations.items()}
    keys = {f"{name} {grid} {batch}": (name, grid, batch) for name, grid, batch in ways}
    at_once = {text: repeated(ways[key], REPEATS) for text, key in keys.items()}
    with torch.no_grad():
        seconds = interleaved(at_once, rounds, clock=clock, progress=progress)
    rows = []
    for text, (name, (height, width), batch) in keys.items():
        counts = count_work(ways[keys[text]])
        rows.append(
            {
                "suite": "micro",
                "way": name,
                "batch": batch,
                "visual_tokens": height * width * batch,
                "reduction": REDUCTION,
                **timing(seconds[text] / REPEATS),
                "operations": counts.operations,
                "waits": counts.waits,
                "peak_bytes": counts.peak_bytes,
            }
        )
    return rows


def _operations(grid: tuple[int, int], batch: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The operations on one batch, by name."""
    grids, cells = torch.tensor([grid] * batch), grid[0] * grid[1]
    first = forced_ids(grids, REDUCTION)
    ids = torch.stack([first, first + 2], dim=1).to(device)
    meaningless = torch.zeros(VOCABULARY, dtype=torch.bool, device=device)
    meaningless[1] = meaningless[3] = True  # every second run is meaningless
    rle, drop = CompressionConfig("rle"), CompressionConfig("rle_drop_top2")
    plan = run_length_plan(ids, grids, rle)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    features = torch.randn(batch * cells, WIDTH, device=device, dtype=dtype)
    row = torch.tensor([1] + [IMAGE_TOKEN] * cells + [5] * (TEXT_TOKENS - 1), device=device)
    prompts = row.repeat(batch, 1)
    mask = torch.ones_like(prompts)

    def rewrite() -> Any:
        shorter = plan_prompt(prompts, mask, IMAGE_TOKEN, plan.anchor, plan.num_cells, "suffix")
        return shorter.shorten({"input_ids": prompts}, 0)

    return {
        "plan, rle": lambda: run_length_plan(ids, grids, rle),
        "plan, rle_drop_top2": lambda: run_length_plan(ids, grids, drop, meaningless=meaningless),
        "pool, mean": lambda: merge_features(features, plan, "mean"),
        "rewrite": rewrite,
    }
