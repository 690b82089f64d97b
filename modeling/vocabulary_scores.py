"""Find the best rows of an output matrix for many features, without holding all scores at once."""

from collections.abc import Iterator

import torch

# Rows scored at a time, fewer if they are halves on a CPU: what is cast to float32 there then stays below 32 MB, and
# malloc hands such blocks out again without new page faults.
CHUNK, CPU_HALVES_CHUNK = 8192, 1024
HALVES = (torch.bfloat16, torch.float16)
# Rounding to bfloat16 moves a score by up to 2^-8 of itself, and two scores apart or together by twice that; doubled
# for the sums that were rounded.
ROUNDING = 2.0**-6
CANDIDATES = 8


def top_k_tokens(
    features: torch.Tensor,
    weight: torch.Tensor,
    k: int = 1,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    transform: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k highest-scoring rows of a matrix and how sure they are, one slice of the matrix at a time.

    Args:
        features: (N, d) floating point.
        weight: (V, d) floating point, possibly on another device or of another dtype.
        k: rows per feature.
        bias: (V,) or None.
        chunk_size: rows scored at a time, None for what suits the device; memory is N x chunk_size float32.
        transform: (d, d) matrix applied to the features first, or None.

    Returns:
        ids: (N, k) long, best first; log_probs: (N, k) float32, log-softmax over all rows; on the device of
        `features`.

    Raises:
        ValueError: if the widths differ, k is not within 1..V, or a matrix is offloaded or quantized.
    """
    _check(features, weight, k)
    inputs, best = _inputs(features, weight, transform), _Best(k)
    normalizer = torch.full((len(inputs),), -torch.inf, device=inputs.device)
    for begin, scores in _scored(inputs, weight, bias, chunk_size):
        normalizer = torch.logaddexp(normalizer, scores.logsumexp(dim=1))
        best.add(scores, begin)
    return best.ids.to(features.device), (best.scores - normalizer[:, None]).to(features.device)


def best_tokens(
    features: torch.Tensor,
    weight: torch.Tensor,
    k: int = 1,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    transform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Find the k highest-scoring rows of a matrix, (N, k) long, best first; cheaper than ``top_k_tokens``.

    The rows are those of ``top_k_tokens``, but which of two comes first is open if their scores are equal to within
    the rounding of a float32 sum. Arguments and errors are the same.
    """
    _check(features, weight, k)
    rounded = weight.device.type == "cpu" and features.dtype == weight.dtype == torch.bfloat16
    if rounded and transform is None and bias is None and len(weight) > k + CANDIDATES:
        ids = _best_of_rounded(features.detach().cpu(), weight.detach(), k, chunk_size or CPU_HALVES_CHUNK)
    else:
        ids = _best_rows(_inputs(features, weight, transform), weight, k, bias, chunk_size).ids
    return ids.to(features.device)


class _Best:
    """The k best scores (N, k) and their columns so far; of equal scores in different slices the first stays."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.scores = self.ids = torch.empty(0)

    def add(self, scores: torch.Tensor, begin: int) -> None:
        """Take in scores (N, C) of the columns from `begin` on."""
        if self.k == 1:  # a maximum is cheaper than a sorted list, and merges without one
            top, index = scores.max(dim=1, keepdim=True)
        else:
            top, index = scores.topk(min(self.k, scores.shape[1]), dim=1)
        index = index + begin
        if begin == 0:
            self.scores, self.ids = top, index
        elif self.k == 1:
            higher = top > self.scores
            self.scores = torch.where(higher, top, self.scores)
            self.ids = torch.where(higher, index, self.ids)
        else:
            top, index = torch.cat([self.scores, top], dim=1), torch.cat([self.ids, index], dim=1)
            self.scores, order = top.topk(min(self.k, top.shape[1]), dim=1)
            self.ids = index.gather(1, order)


def _check(features: torch.Tensor, weight: torch.Tensor, k: int) -> None:
    num_rows, hidden_size = require_readable(weight).shape
    if features.ndim != 2 or features.shape[1] != hidden_size:
        raise ValueError(f"features has shape {tuple(features.shape)}; expected (cells, {hidden_size})")
    if not 1 <= k <= num_rows:
        raise ValueError(f"k={k} must lie within 1..{num_rows}, the number of readings to choose from")


def _inputs(features: torch.Tensor, weight: torch.Tensor, transform: torch.Tensor | None) -> torch.Tensor:
    """Return what is multiplied with the rows, on the device of `weight`: float32, or halves where those will do."""
    inputs = features.detach()
    if transform is not None:
        matrix = require_readable(transform).detach().float()
        inputs = inputs.to(matrix.device, torch.float32) @ matrix.T
    elif weight.is_cuda and features.dtype == weight.dtype and weight.dtype in HALVES:
        return inputs.to(weight.device)
    return inputs.to(weight.device, torch.float32)


def _scored(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk_size: int | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row of every slice of `weight` and the float32 scores (N, slice) of its rows."""
    casts = weight.device.type == "cpu" and weight.dtype != torch.float32
    chunk_size = chunk_size or (CPU_HALVES_CHUNK if casts else CHUNK)
    for begin in range(0, len(weight), chunk_size):
        scores = float32_product(inputs, weight[begin : begin + chunk_size].detach())
        yield begin, scores if bias is None else scores + bias[begin : begin + chunk_size].detach().float()


def float32_product(inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return inputs (N, d) times rows (C, d) transposed, (N, C) float32.

    Products of two halves are exact in float32, so halves are multiplied as they are: only the order of the sums
    differs from casting them first. CUDA alone offers that.
    """
    if inputs.dtype == torch.float32:
        return inputs @ rows.float().T
    return torch.mm(inputs, rows.T, out_dtype=torch.float32)


def _best_rows(
    inputs: torch.Tensor, weight: torch.Tensor, k: int, bias: torch.Tensor | None, chunk_size: int | None
) -> _Best:
    best = _Best(k)
    for begin, scores in _scored(inputs, weight, bias, chunk_size):
        best.add(scores, begin)
    return best


def _best_of_rounded(features: torch.Tensor, weight: torch.Tensor, k: int, chunk_size: int) -> torch.Tensor:
    """Return the k best rows, (N, k) long, of bfloat16 matrices on a CPU.

    A CPU multiplies bfloat16 several times faster than float32 but rounds the scores. So the rounded scores only name
    candidates; where rounding could have changed the order, the candidates are scored again in float32, and where it
    could have hidden a candidate, everything is.
    """
    best = _Best(k + CANDIDATES)
    for begin in range(0, len(weight), chunk_size):
        best.add((features @ weight[begin : begin + chunk_size].T).float(), begin)
    scores, ids = best.scores, best.ids
    slack = ROUNDING * scores.abs()
    close = (scores[:, :k] - scores[:, 1 : k + 1] <= slack[:, :k].maximum(slack[:, 1 : k + 1])).any(dim=1)
    hidden = scores[:, k - 1] - scores[:, -1] <= slack[:, k - 1].maximum(slack[:, -1])
    for part in (close & ~hidden).nonzero().flatten().split(64):  # 64 cells of candidates fit a cache
        exact = (weight[ids[part]].float() @ features[part, :, None].float())[..., 0]
        ids[part, :k] = ids[part].gather(1, exact.topk(k, dim=1).indices)
    unclear = hidden.nonzero().flatten()
    if len(unclear):
        ids[unclear, :k] = _best_rows(features[unclear].float(), weight, k, None, chunk_size).ids
    return ids[:, :k]


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
