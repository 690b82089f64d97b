"""How much every visual token counts for a logit: integrated gradients, and attribution patching in one pass.

The path runs from a baseline x' (the dataset mean) to the picture's own features x, over the connector output and, for
Qwen3-VL, the deepstack features together. Only visual tokens are on it. Integrated gradients (arXiv 1703.01365) obey
completeness: their sum is y(x) - y(x'); how far a numerical path misses that is returned. The public code of arXiv
2410.07149 took the logit of the sentence-start token where it meant "Yes", and moved one text token along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..prompt_rows import feature_layers, prompt_rows, visual_counts, with_layers
from ..settings import uncompressed
from .replacement import Reference


@dataclass
class Attribution:
    """Attributions of one prompt.

    Attributes:
        signed: (N,) float64, sum over channels of (x - x') * mean gradient; positive: the token speaks for the answer.
        magnitude: (N,) float64, the same with absolute values of every channel, as arXiv 2410.07149 ranks.
        change: y(x) - y(x'), what the signed scores should add up to.
        error: |sum of signed - change|.
    """

    signed: np.ndarray
    magnitude: np.ndarray
    change: float
    error: float

    def ranking(self, by: str = "magnitude") -> np.ndarray:
        """(N,) token indices, most important first; ties by index."""
        return np.argsort(-getattr(self, by), kind="stable")


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    output: Any,
    token_ids: Sequence[int],
    reference: Reference,
    steps: int = 16,
    rows_per_pass: int = 64,
) -> list[Attribution]:
    """Integrated gradients of one logit per prompt, by Gauss-Legendre quadrature.

    Args:
        model: a supported model, not wrapped.
        inputs: (B, L) prompts with one image each, left-padded.
        output: of ``get_image_features`` for them.
        token_ids: vocabulary id of the logit at the last position, one per prompt.
        reference: gives the baseline, the mean of every stage.
        steps: points on the path.
        rows_per_pass: path points per forward and backward pass.

    Raises:
        ValueError: if `steps` is below 1 or the numbers differ.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}.")
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return _along_path(model, inputs, output, token_ids, reference, (nodes + 1) / 2, weights / 2, rows_per_pass)


def attribution_patching(
    model: nn.Module, inputs: Any, output: Any, token_ids: Sequence[int], reference: Reference, rows_per_pass: int = 64
) -> list[Attribution]:
    """First-order estimate of what replacing each token by the mean would take off the logit: one backward pass.

    Arguments as in ``integrated_gradients``; `error` says how far the estimates are from adding up to the effect of
    replacing all tokens.
    """
    return _along_path(model, inputs, output, token_ids, reference, np.ones(1), np.ones(1), rows_per_pass)


def _along_path(
    model: nn.Module,
    inputs: Any,
    output: Any,
    token_ids: Sequence[int],
    reference: Reference,
    nodes: np.ndarray,
    weights: np.ndarray,
    rows_per_pass: int,
) -> list[Attribution]:
    sizes = visual_counts(model, inputs)
    if len(token_ids) != len(sizes):
        raise ValueError(f"token_ids must be one per prompt: {len(token_ids)} ids, {len(sizes)} prompts.")
    layers = [
        (values.detach(), reference.means[stage, number].to(values))
        for stage, number, values in feature_layers(output)
    ]
    gradients = [torch.zeros_like(values, dtype=torch.float64) for values, _ in layers]
    points = [(row, node) for node in range(len(nodes)) for row in range(len(sizes))]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for begin in range(0, len(points), rows_per_pass):
        part = points[begin : begin + rows_per_pass]
        grads = _gradients(model, inputs, output, layers, token_ids, [(row, float(nodes[node])) for row, node in part])
        for total, found in zip(gradients, grads, strict=True):
            for (row, node), gradient in zip(part, found, strict=True):
                total[starts[row] : starts[row + 1]] += weights[node] * gradient.double()
    contributions = [
        (values - base).double() * gradient for (values, base), gradient in zip(layers, gradients, strict=True)
    ]
    signed = torch.stack([part.sum(-1) for part in contributions]).sum(0)
    magnitude = torch.stack([part.abs().sum(-1) for part in contributions]).sum(0)
    ends = _ends(model, inputs, output, layers, token_ids)
    attributions = []
    for row, change in enumerate(ends.tolist()):
        own = slice(int(starts[row]), int(starts[row + 1]))
        scores = signed[own].cpu().numpy()
        error = abs(float(scores.sum()) - change)
        attributions.append(Attribution(scores, magnitude[own].cpu().numpy(), change, error))
    return attributions


def _gradients(
    model: nn.Module,
    inputs: Any,
    output: Any,
    layers: list[tuple[torch.Tensor, torch.Tensor]],
    token_ids: Sequence[int],
    points: list[tuple[int, float]],
) -> list[list[torch.Tensor]]:
    """Gradient of each point's logit with respect to each layer: layers x points x (N, d)."""
    sizes = visual_counts(model, inputs)
    index = [row for row, _ in points]
    counts = [sizes[row] for row in index]
    leaves = []
    for values, base in layers:
        rows = values.split(sizes)
        leaves.append(torch.cat([base + share * (rows[row] - base) for row, share in points]).requires_grad_())
    rows_inputs = prompt_rows(model, inputs, output, index)
    rows_inputs["mm_encoder_outputs"] = {"image": with_layers(output, leaves, counts)}
    with torch.enable_grad():
        logits = model(**rows_inputs, **uncompressed(model), logits_to_keep=1, use_cache=False).logits[:, -1]
        chosen = logits[torch.arange(len(index)), [token_ids[row] for row in index]].sum()
        grads = torch.autograd.grad(chosen, leaves, allow_unused=True)
    whole = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return [list(grad.split(counts)) for grad in whole]


@torch.no_grad()
def _ends(
    model: nn.Module,
    inputs: Any,
    output: Any,
    layers: list[tuple[torch.Tensor, torch.Tensor]],
    token_ids: Sequence[int],
) -> torch.Tensor:
    """y(x) - y(x') of every prompt, (B,) float64."""
    sizes = visual_counts(model, inputs)
    values = []
    for at_baseline in (False, True):
        rows = prompt_rows(model, inputs, output, range(len(sizes)))
        flat = [base.expand_as(own) if at_baseline else own for own, base in layers]
        rows["mm_encoder_outputs"] = {"image": with_layers(output, flat, sizes)}
        logits = model(**rows, **uncompressed(model), logits_to_keep=1, use_cache=False).logits[:, -1].double()
        values.append(logits[torch.arange(len(sizes)), list(token_ids)])
    return values[0] - values[1]
