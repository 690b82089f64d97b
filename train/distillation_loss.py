"""The distillation loss of a visual decoder, with memory that does not grow with cells x vocabulary.

For one image position with teacher scores t and student scores s::

    alpha tau^2 KL(softmax(t / tau) || softmax(s / tau)) + (1 - alpha) CE(s, argmax t)

Its derivative with respect to s is known in closed form, so each chunk of positions is projected, scored and turned
into gradients of the weights at once: at no time are the scores of more than one chunk in memory, and none of them is
computed a second time for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

COLUMN_SLICE = 16384  # vocabulary entries of a half-precision matrix that are widened at a time


@dataclass(frozen=True)
class TeacherHead:
    """The frozen output matrix that turns the teacher's states into scores.

    Attributes:
        weight: (V, d), any floating dtype.
        bias: (V,) or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class LossParts:
    """What the loss is made of, summed over N image positions; detached scalars.

    Attributes:
        kl: KL(teacher || student) at the temperature, without the factor tau^2.
        ce: cross-entropy of the student with the teacher's best class.
        agreement: positions where the best class of both is the same.
    """

    kl: torch.Tensor
    ce: torch.Tensor
    agreement: torch.Tensor


def distillation_loss(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    states: torch.Tensor,
    head: TeacherHead,
    *,
    alpha: float,
    temperature: float,
    token_classes: torch.Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[torch.Tensor, LossParts]:
    """Sum the distillation loss over image positions; differentiable in `inputs` and `weight`.

    Args:
        inputs: (N, d) what the student multiplies with its matrix: the features, transformed or not.
        weight: (C, d) the student's matrix.
        states: (N, d') the teacher's states, normalised if the teacher is meant to be.
        head: scores the states over the vocabulary, V entries.
        alpha: share of the soft term, 0..1.
        temperature: tau > 0.
        token_classes: (V,) class of every vocabulary entry, 0..C-1, for a student whose classes are not the
            vocabulary: the teacher's probabilities are summed by class, its best token stands for its class.
        chunk_size: positions scored at a time; memory is about 6 x chunk_size x V floats.

    Returns:
        The sum over positions, a float32 scalar (float64 for float64 inputs), and its parts.

    Raises:
        ValueError: sizes disagree, or a number is out of range.
    """
    check_strengths(alpha, temperature)
    classes = head.weight.shape[0] if token_classes is None else int(weight.shape[0])
    if len(inputs) != len(states):
        raise ValueError(f"inputs and states must be paired: {len(inputs)} and {len(states)} positions.")
    if weight.shape[0] != classes or (token_classes is not None and len(token_classes) != head.weight.shape[0]):
        raise ValueError(
            f"the student scores {weight.shape[0]} classes and the teacher {head.weight.shape[0]} tokens"
            + ("; give token_classes." if token_classes is None else f", but token_classes has {len(token_classes)}.")
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    settings = _Settings(alpha, temperature, None if token_classes is None else token_classes.long(), chunk_size)
    loss, kl, ce, agreement = _DistillationLoss.apply(inputs, weight, states.detach(), head, settings)
    return loss, LossParts(kl, ce, agreement)


def check_strengths(alpha: float, temperature: float) -> None:
    """Check the two numbers of the loss.

    Raises:
        ValueError: naming the one that is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie within 0..1: the share of the soft term.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0.")


@dataclass(frozen=True)
class _Settings:
    alpha: float
    temperature: float
    token_classes: torch.Tensor | None
    chunk_size: int


class _DistillationLoss(torch.autograd.Function):
    """Loss and gradients of all chunks, one chunk after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        states: torch.Tensor,
        head: TeacherHead,
        settings: _Settings,
    ) -> tuple[torch.Tensor, ...]:
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        wants_inputs, wants_weight = ctx.needs_input_grad[:2]
        sums = torch.zeros(4, dtype=dtype, device=inputs.device)
        inputs_grad = torch.zeros_like(inputs, dtype=dtype) if wants_inputs else None
        weight_grad = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        for begin in range(0, len(inputs), settings.chunk_size):
            rows = slice(begin, begin + settings.chunk_size)
            chunk = inputs[rows].to(dtype)
            teacher = _project(states[rows].to(dtype), head.weight, head.bias)
            scores = _project(chunk, weight)
            chunk_sums, slope = _loss_and_slope(scores, teacher, settings, wants_inputs or wants_weight)
            sums += chunk_sums
            if weight_grad is not None:
                weight_grad.addmm_(slope.T, chunk)
            if inputs_grad is not None:
                inputs_grad[rows] = _project_back(slope, weight)
        ctx.save_for_backward(inputs_grad, weight_grad)
        ctx.dtypes = inputs.dtype, weight.dtype
        loss, kl, ce, agreement = sums.unbind()
        ctx.mark_non_differentiable(kl, ce, agreement)
        return loss, kl, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * loss_grad).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None


def _loss_and_slope(
    scores: torch.Tensor, teacher: torch.Tensor, settings: _Settings, wants_slope: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(4,) sums loss, KL, CE, agreement of a chunk, and (n, C) the derivative of the loss by `scores`."""
    alpha, tau, classes = settings.alpha, settings.temperature, settings.token_classes
    best = teacher.argmax(1)
    wanted = (teacher / tau).softmax(1)
    if classes is not None:
        best = classes[best]
        wanted = torch.zeros_like(scores).index_add_(1, classes, wanted)
    soft, hard = (scores / tau).log_softmax(1), scores.log_softmax(1)
    kl = torch.xlogy(wanted, wanted).sum() - (wanted * soft).sum()
    ce = -hard.gather(1, best[:, None]).sum()
    agreement = (scores.argmax(1) == best).sum()
    sums = torch.stack([alpha * tau**2 * kl + (1 - alpha) * ce, kl, ce, agreement.to(kl.dtype)])
    if not wants_slope:
        return sums, scores
    slope = soft.exp_().sub_(wanted).mul_(alpha * tau)
    hard.exp_()[torch.arange(len(best), device=best.device), best] -= 1
    return sums, slope.add_(hard, alpha=1 - alpha)


def _project(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows @ matrix.T + bias`` in the dtype of `rows`, without a widened copy of a half-precision matrix."""
    if matrix.dtype == rows.dtype:
        scores = rows @ matrix.T
    else:
        scores = torch.cat([rows @ part.to(rows.dtype).T for part in matrix.split(COLUMN_SLICE)], dim=1)
    return scores if bias is None else scores.add_(bias.to(rows.dtype))


def _project_back(slope: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``slope @ matrix`` in the dtype of `slope`, widening as ``_project`` does."""
    result = slope.new_zeros(len(slope), matrix.shape[1])
    for columns, part in zip(slope.split(COLUMN_SLICE, dim=1), matrix.split(COLUMN_SLICE), strict=True):
        result.addmm_(columns, part.to(slope.dtype))
    return result
