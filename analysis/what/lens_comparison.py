"""Lenses side by side on the same cached states: how near each is to what the model itself says at its last depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.modeling.families import family_of
from dualstream.modeling.vision_depths import native_vision_depth
from dualstream.processing import build_inputs
from dualstream.processing.inference import READING_PROMPT

from .depth_maps import LENSES, NORMED, Step
from .reading import visit_steps
from .scoring import Lenses

if TYPE_CHECKING:
    from PIL.Image import Image


def native_states(model: Any, processor: Any, images: Sequence[Image]) -> tuple[dict[int, torch.Tensor], list[int]]:
    """States of all language-model depths at the native vision depth.

    Args:
        model: the model, without a PEFT wrapper.
        processor: its processor.
        images: a batch of RGB pictures.

    Returns:
        depth -> (N, d) states before any norm, all pictures one after the other; tokens of each picture.
    """
    inputs = build_inputs(processor, list(images), [READING_PROMPT] * len(images))
    inputs.pop("compression", None)
    native = native_vision_depth(model)
    states: dict[int, torch.Tensor] = {}
    steps = [Step(native, k) for k in range(len(family_of(model).llm_blocks(model)) + 1)]

    def keep(step: Step, at: torch.Tensor) -> None:
        states[step.llm_depth or 0] = at.clone()

    grids, index = visit_steps(model, inputs.to(model.device), steps, keep)
    return states, [int(grids[index == number].prod(-1).sum()) for number in range(len(images))]


def compare_lenses(lenses: Lenses, states: dict[int, torch.Tensor], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Compare every lens at every depth with the normed reading of the last depth.

    Args:
        lenses: model and tuned lens.
        states: depth -> (N, d), from ``native_states``.
        sizes: tokens of every picture.

    Returns:
        One row per depth and lens: ``llm_depth``, ``lens``, and per picture ``agreement`` (share of tokens with the
        same best word) and ``divergence`` (mean KL of the last depth's distribution from the lens's, nats), lists.
    """
    last = max(states)
    head = lenses.family.unembedding(lenses.model)
    teacher = lenses.prepared(states[last], Step(0, last, NORMED))
    best = lenses.read(states[last], Step(0, last, NORMED)).ids[:, 0]
    rows = []
    for depth in sorted(states):
        for lens in LENSES:
            step = Step(0, depth, lens)
            same = (lenses.read(states[depth], step).ids[:, 0] == best).float()
            apart = divergence(teacher, lenses.prepared(states[depth], step), head.weight, head.bias).cpu()
            rows.append(
                {
                    "llm_depth": depth,
                    "lens": lens,
                    "agreement": [float(part.mean()) for part in same.split(list(sizes))],
                    "divergence": [float(part.mean()) for part in apart.split(list(sizes))],
                }
            )
    return rows


@torch.no_grad()
def divergence(
    teacher: torch.Tensor, student: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, chunk: int = 8192
) -> torch.Tensor:
    """KL(softmax(M t + b) || softmax(M s + b)) per row, without holding all scores at once.

    Args:
        teacher: (N, d).
        student: (N, d).
        matrix: (V, d).
        bias: (V,) or None.
        chunk: rows of the matrix taken at a time.

    Returns:
        (N,) float32, nats.
    """
    teacher, student = teacher.float().to(matrix.device), student.float().to(matrix.device)

    def scores(rows: torch.Tensor, begin: int) -> torch.Tensor:
        offset = 0 if bias is None else bias[begin : begin + chunk].float()
        return rows @ matrix[begin : begin + chunk].float().T + offset

    starts = range(0, len(matrix), chunk)
    sums = [teacher.new_full((len(teacher),), -torch.inf) for _ in (teacher, student)]
    for begin in starts:
        for number, rows in enumerate((teacher, student)):
            sums[number] = torch.logaddexp(sums[number], scores(rows, begin).logsumexp(-1))
    gap = torch.zeros_like(sums[0])
    for begin in starts:
        wanted = scores(teacher, begin)
        gap += ((wanted - sums[0][:, None]).exp() * (wanted - scores(student, begin))).sum(-1)
    return (gap - sums[0] + sums[1]).clamp_min(0)


def pooled(rows: Sequence[dict[str, Any]], name: str) -> dict[tuple[int, str], np.ndarray]:
    """Join rows of ``compare_lenses`` of several batches: (depth, lens) -> (pictures,)."""
    joined: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        joined.setdefault((row["llm_depth"], row["lens"]), []).extend(row[name])
    return {key: np.array(values) for key, values in joined.items()}
