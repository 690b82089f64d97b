"""Find the best rows of an output matrix for many features, without holding all scores at once."""

import torch


def top_k_tokens(
    features: torch.Tensor,
    weight: torch.Tensor,
    k: int = 1,
    bias: torch.Tensor | None = None,
    chunk_size: int = 8192,
    transform: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k highest-scoring rows of a matrix, one slice of it at a time.

    Args:
        features: (N, d) floating point.
        weight: (V, d) floating point, possibly on another device or of another dtype.
        k: rows per feature.
        bias: (V,) or None.
        chunk_size: rows scored at a time; memory is N x chunk_size float32.
        transform: (d, d) matrix applied to the features first, or None.

    Returns:
        ids: (N, k) long, best first; log_probs: (N, k) float32, log-softmax over all rows; on the device of
        `features`.

    Raises:
        ValueError: if the widths differ, k is not within 1..V, or a matrix is offloaded or quantized.
    """
    num_rows, hidden_size = require_readable(weight).shape
    if features.ndim != 2 or features.shape[1] != hidden_size:
        raise ValueError(f"features has shape {tuple(features.shape)}; expected (cells, {hidden_size})")
    if not 1 <= k <= num_rows:
        raise ValueError(f"k={k} must lie within 1..{num_rows}, the number of readings to choose from")
    inputs = features.detach()
    if transform is not None:
        matrix = require_readable(transform).detach().float()
        inputs = inputs.to(matrix.device, torch.float32) @ matrix.T
    inputs = inputs.to(weight.device, torch.float32)
    best = inputs.new_empty(len(inputs), 0)
    best_ids = best.long()
    normalizer = inputs.new_full((len(inputs),), -torch.inf)
    for begin in range(0, num_rows, chunk_size):
        scores = inputs @ weight[begin : begin + chunk_size].detach().float().T
        if bias is not None:
            scores = scores + bias[begin : begin + chunk_size].detach().float()
        normalizer = torch.logaddexp(normalizer, scores.logsumexp(dim=1))
        top, index = scores.topk(min(k, scores.shape[1]), dim=1)
        best, order = torch.cat([best, top], dim=1).topk(min(k, best.shape[1] + top.shape[1]), dim=1)
        best_ids = torch.cat([best_ids, index + begin], dim=1).gather(1, order)
    return best_ids.to(features.device), (best - normalizer[:, None]).to(features.device)


def require_readable(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix that is in memory and of floating point.

    Raises:
        ValueError: if it is offloaded or quantized.
    """
    if weight.is_meta:
        raise ValueError(
            "the matrix that reads the features is offloaded; load the model with a device_map that keeps lm_head on "
            "a device, or pass a visual decoder"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the matrix that reads the features is quantized ({weight.dtype}); keep the output head unquantized, "
            "or pass a visual decoder"
        )
    return weight


def mean_row(matrix: torch.Tensor, chosen: torch.Tensor, chunk_size: int = 8192) -> torch.Tensor:
    """Return the mean (d,) in float32 of the chosen rows of a matrix.

    Args:
        matrix: (V, d) floating point.
        chosen: (V,) bool, at least one true.
        chunk_size: rows taken at a time.
    """
    total = torch.zeros(matrix.shape[1], device=matrix.device)
    for begin in range(0, len(matrix), chunk_size):
        total += chosen[begin : begin + chunk_size].float() @ matrix[begin : begin + chunk_size].float()
    return total / chosen.sum()
