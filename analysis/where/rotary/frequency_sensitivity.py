"""E8: how much the answer depends on each rotary frequency of the vision tower, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dualstream.eval.chat_inputs import answer_tokens, chat_batch, chat_prompt, user_turn

from ..axis_questions import axis_question, opposite
from ..effects import corrected, effect
from ..experiment import Experiment, Finding, ReportTable, above, pending
from .vision_rotation import VisionRotary, image_of_patch, rotation_problem, rotation_replaced, vision_rotary

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench
    from ..items import WhereItem

AXIS_NAMES = ("h", "w")
STATEMENTS = {
    "horizontal": "Left and right depend on the frequencies of the width more than on those of the height",
    "vertical": "Relations along the height depend on its frequencies more than on those of the width",
}


class FrequencySensitivity(Experiment):
    """Gradient of the right answer against its opposite with respect to every frequency, axis and block."""

    name = "frequency_sensitivity"
    title = "Which rotary frequencies the answer depends on"
    question = (
        "How does the log-odds of the right relation against its opposite change when one frequency of one axis in "
        "one block of the vision tower is scaled by a small factor? Figures are derivatives by the logarithm of the "
        "frequency, in nats per factor e; left and right should hang on the width, above and below on the height."
    )

    def reason_to_skip(self, bench: Bench) -> str | None:
        """No rotary positions in the tower."""
        return rotation_problem(bench.model)

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """One unit per batch of pictures."""
        batches = {f"batch-{number:04d}": part for number, part in enumerate(bench.batches(bench.items))}
        for unit in pending(list(batches), rows, self.title):
            rows.write(unit, sensitivities(bench, batches[unit]))

    def summarize(self, table: pa.Table) -> list[Finding]:
        """Whether the relation's own axis matters, and whether a common scaling would help at first order."""
        frame = table.to_pandas()
        shares = own_axis_shares(frame)
        gain = effect(stacked_gradients(frame).sum((1, 2, 3)), frame["pair_id"])
        findings = []
        for axis, statement in STATEMENTS.items():
            own, others = shares[shares["axis"] == axis], shares[shares["axis"] != axis]
            found = effect(own["share"], own["pair_id"]).estimate
            # On the same axis of the tower: what the other relations, which lie across it, depend on.
            control = effect(1 - others["share"], others["pair_id"]).estimate
            rule = "yes: share of this axis in the absolute derivatives of both above 0.5; no: below"
            findings.append(
                Finding(
                    statement, found, above(found, 0.5), rule, control, "for the relations across it", "of both axes"
                )
            )
        return [
            *findings,
            Finding(
                "At first order, scaling all frequencies of the tower up makes the right answer more likely",
                gain.estimate,
                above(gain.estimate, 0.0),
                "yes: sum of the derivatives above 0; no: below",
                None,
                "0",
                "nats per factor e",
            ),
        ]

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """Derivatives by frequency on either axis, all blocks together."""
        frame = table.to_pandas()
        gradients = stacked_gradients(frame).sum(1)  # (n, 2, F)
        frequencies = np.array(frame["frequencies"].iloc[0]).reshape(2, -1)
        family = {}
        for axis, name in enumerate(AXIS_NAMES):
            for entry in range(gradients.shape[-1]):
                family[name, entry] = effect(gradients[:, axis, entry], frame["pair_id"])
        sizes = np.abs(gradients).mean(0)
        lines = [
            (name, entry, float(frequencies[AXIS_NAMES.index(name), entry]), found.estimate, found.corrected, size)
            for (name, entry), found, size in zip(
                family, corrected(family).values(), sizes.flatten().tolist(), strict=True
            )
        ]
        columns = ("axis", "frequency", "radians per patch", "derivative, nats", "Holm p", "mean |derivative|")
        return [ReportTable("Derivative of the log-odds by the logarithm of each frequency", columns, lines)]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """By frequency and by block, for relations along either axis."""
        from .frequency_figures import draw_sensitivity

        return [draw_sensitivity(table.to_pandas(), folder / f"{self.name}.png")]


@contextmanager
def frequency_leaves(rotary: VisionRotary, images: int) -> Iterator[torch.Tensor]:
    """Make the frequencies of every block and image leaves of the graph for the length of a ``with`` block.

    Args:
        rotary: of the model.
        images: number of images of the passes inside.

    Yields:
        (images, blocks, columns, F) float32 that requires a gradient: the frequencies in use. It may be changed in
        place between passes.
    """
    count = len(rotary.attentions)
    table = rotary.frequencies.expand(images, count, *rotary.frequencies.shape).clone().requires_grad_()
    strength = getattr(rotary.module, "attention_scaling", 1.0)

    def rotate(block: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = table[image_of_patch(positions), block]
        angles = rotary.angles(positions, own)
        return angles.cos() * strength, angles.sin() * strength

    with rotation_replaced(rotary, rotate):
        yield table


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of all parameters and put every one back as it was."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def gradient_by_frequency(
    rotary: VisionRotary, images: int, contrasts: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivative of each image's figure by the frequencies of every block.

    Args:
        rotary: of the model.
        images: number of images.
        contrasts: computes one figure per image, (images,), that depends on that image's rotation alone.

    Returns:
        The figures (images,) and the derivatives (images, blocks, columns, F), both detached.
    """
    with frequency_leaves(rotary, images) as table, torch.enable_grad():
        found = contrasts()
        (gradient,) = torch.autograd.grad(found.sum(), table)
    return found.detach(), gradient


def sensitivities(bench: Bench, items: Sequence[WhereItem]) -> list[dict[str, Any]]:
    """Rows of one pass: derivatives by the logarithm of every frequency, height first.

    The figure is the log-odds of the right relation against its opposite in the model's next token, as the first
    token of either answer that differs.

    Raises:
        ValueError: the two answers do not differ in their first token.
    """
    rotary = vision_rotary(bench.model)
    inputs, ids = _asked(bench, items)

    def contrasts() -> torch.Tensor:
        logits = bench.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        right, wrong = logits.gather(-1, ids).unbind(-1)
        return right - wrong

    with frozen_parameters(bench.model):
        figures, gradient = gradient_by_frequency(rotary, len(items), contrasts)
    order = torch.tensor([rotary.axes.index(axis) for axis in AXIS_NAMES], device=gradient.device)
    by_log = (gradient * rotary.frequencies.to(gradient))[:, :, order].double().cpu()
    used = rotary.frequencies[order.to(rotary.frequencies.device)].double().cpu()
    return [
        {
            "pair_id": item.pair_id,
            "item": item.name,
            "relation": item.relation,
            "axis": item.axis,
            "log_odds": float(figures[number]),
            "derivatives": by_log[number].flatten(1).tolist(),
            "frequencies": used.flatten().tolist(),
        }
        for number, item in enumerate(items)
    ]


def stacked_gradients(frame: pd.DataFrame) -> np.ndarray:
    """Derivatives of all rows, (n, blocks, 2, F), height first."""
    table = np.stack([np.stack(list(blocks)) for blocks in frame["derivatives"]]).astype(np.float64)
    return table.reshape(*table.shape[:2], 2, -1)


def own_axis_shares(frame: pd.DataFrame) -> pd.DataFrame:
    """Per picture: share of the relation's own axis in the absolute derivatives of both, all blocks together."""
    sizes = np.abs(stacked_gradients(frame)).sum((1, 3))  # (n, 2)
    own = np.where(frame["axis"] == "horizontal", sizes[:, 1], sizes[:, 0])
    return frame[["pair_id", "axis"]].assign(share=own / sizes.sum(1))


def _asked(bench: Bench, items: Sequence[WhereItem]) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs of the questions along the own axes, and the first tokens of the right and the opposite answer."""
    questions = [axis_question(item, bench.relations) for item in items]
    turns = [user_turn(question.text, 1) for question in questions]
    prompts = [chat_prompt(bench.processor, turn) for turn in turns]
    ids = []
    for item, turn, prompt in zip(items, turns, prompts, strict=True):
        answers = (item.relation, opposite(bench.relations, item.relation))
        right, wrong = (tokens[0] for tokens in answer_tokens(bench.processor, turn, prompt, answers))
        if right == wrong:
            raise ValueError(f"the answers {answers[0]!r} and {answers[1]!r} start with the same token.")
        ids.append([right, wrong])
    batch = chat_batch(bench.processor, prompts, [[item.image()] for item in items])
    return dict(batch.to(bench.model.device)), torch.tensor(ids, device=bench.model.device)
