"""What a scaling costs at run time: scaled and stock forward passes in turn, in one run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np


def measure_latency(
    model: Any, inputs: Any, scaling: Any, rounds: int = 40, warmup: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Time whole forward passes, three per round in a random order: stock, stock once more, scaled.

    The second stock pass tells what the ratio of two equal things looks like on this machine.

    Args:
        model: a model whose tower can be scaled.
        inputs: of its forward pass.
        scaling: see ``RopeScaling.from_any``.
        rounds: how many.
        warmup: rounds before that are not counted.
        seed: of the order and of the intervals.

    Returns:
        ``scaled_to_stock`` and ``stock_to_stock``, each the median of the rounds' ratios with a bootstrap 95 %
        interval of that median and the quartiles; ``stock_ms``, the median; ``rounds``.

    Raises:
        ValueError: there are fewer than two rounds.
    """
    import torch

    from dualstream.measuring import median_ratio
    from dualstream.modeling import rope_scaled

    if rounds < 2:
        raise ValueError(f"rounds={rounds} must be at least 2.")
    rng = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {"stock": [], "again": [], "scaled": []}
    for number in range(warmup + rounds):
        for name in rng.permutation(list(seconds)):
            with rope_scaled(model, scaling if name == "scaled" else None), torch.inference_mode():
                _wait(model)
                start = time.perf_counter()
                model(**inputs, logits_to_keep=1, use_cache=False)
                _wait(model)
                elapsed = time.perf_counter() - start
            if number >= warmup:
                seconds[name].append(elapsed)
    stock = np.array(seconds["stock"])
    return {
        "scaled_to_stock": median_ratio(np.array(seconds["scaled"]), stock, seed),
        "stock_to_stock": median_ratio(np.array(seconds["again"]), stock, seed),
        "stock_ms": 1000 * statistics.median(seconds["stock"]),
        "rounds": rounds,
    }


def _wait(model: Any) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
