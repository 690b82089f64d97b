"""E11: positions deleted from the vision tower or the language model, or shuffled, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.analysis.object_tokens import generator
from dualstream.eval.option_scores import option_probabilities

from ..axis_questions import axis_question, score_questions
from ..effects import POINTS, SMALLEST_CHANGE, Effect, corrected, effect, judged_below, on_items, option_margin, rate
from ..effects import pair_of_item as pairs_of
from ..experiment import Experiment, Finding, ReportTable, pending
from ..object_sets import first_items
from ..rotary.vision_rotation import rotation_problem
from ..vision_states import feature_depth, learned_table
from .position_edits import (
    SHUFFLES,
    image_positions_shuffled,
    image_tokens_moved,
    image_tokens_shuffled,
    shuffled_order,
    vision_rotation_deleted,
    vision_table_deleted,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from dualstream.analysis.interventions import VisualPlace
    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench
    from ..items import WhereItem

BASELINE = "none"
ONLY, FROM, ALL = "only", "from", "all"
QUESTIONS = ("spatial", "presence")
MOST_PAIRS = 20
TOLERANCE = 5.0  # points; a smaller loss counts as none
KINDS = {
    "vision_rotation": "the vision tower's RoPE",
    "vision_rotation_h": "the vision tower's RoPE along the height",
    "vision_rotation_w": "the vision tower's RoPE along the width",
    "vision_table": "the vision tower's learned position embeddings",
    "image_in_place": "the image tokens' own places in the language model (all at the first one's)",
    "image_zero": "the image tokens' own places in the language model (all at position 0)",
    "position_ids": "the order of the image tokens' position ids in the language model",
    "tokens_global": "the order of the image tokens (contents shuffled over the picture)",
    "tokens_row": "the order of the image tokens within each row",
    "tokens_column": "the order of the image tokens within each column",
    "tokens_block": "the order of the image tokens within each 2 x 2 block",
}


@dataclass(frozen=True)
class Arm:
    """One way to take positions away.

    Attributes:
        kind: what is taken, a key of ``KINDS``; ``none`` for the model as it is.
        scope: ``only`` one block, ``from`` a block on, or ``all``.
        block: that block, -1 for ``all``.
    """

    kind: str
    scope: str = ALL
    block: int = -1

    @property
    def name(self) -> str:
        """Name of the unit, e.g. ``vision_rotation-only-02``."""
        return self.kind if self.scope == ALL else f"{self.kind}-{self.scope}-{self.block:02d}"

    def blocks(self, count: int) -> range:
        """The blocks of a stack of ``count`` that it concerns."""
        if self.scope == ALL:
            return range(count)
        return range(self.block, self.block + 1 if self.scope == ONLY else count)

    def context(self, bench: Bench, items: Sequence[WhereItem]) -> AbstractContextManager[Any]:
        """Take the positions away while these pictures go through the model in one batch."""
        model = bench.model
        if self.kind == BASELINE:
            return nullcontext()
        if self.kind.startswith("vision_rotation"):
            axis = self.kind.removeprefix("vision_rotation").strip("_")
            return vision_rotation_deleted(model, self.blocks(bench.vision_depth), {axis} if axis else None)
        if self.kind == "vision_table":
            return vision_table_deleted(model, self.blocks(bench.vision_depth), put_back=self.scope == ONLY)
        if self.kind.startswith("image_"):
            return image_tokens_moved(model, self.kind.removeprefix("image_"), self.blocks(bench.llm_depth))
        if self.kind == "position_ids":
            return image_positions_shuffled(model, partial(self._order, bench, items, "global"))
        return image_tokens_shuffled(model, partial(self._order, bench, items, self.kind.removeprefix("tokens_")))

    def _order(self, bench: Bench, items: Sequence[WhereItem], how: str, at: VisualPlace) -> np.ndarray:
        item = items[at.image]
        rng = generator(bench.seed, item.name, self.kind)
        return shuffled_order(how, bench.geometry(bench.size(item)).grids, rng)


def arms_of(bench: Bench) -> list[Arm]:
    """All arms that apply to a model, the untouched model first."""
    seen, llm = feature_depth(bench.model), bench.llm_depth
    arms = [Arm(BASELINE)]
    vision = []
    if rotation_problem(bench.model) is None:
        vision.append("vision_rotation")
        arms += [Arm("vision_rotation_h"), Arm("vision_rotation_w")]
    if learned_table(bench.model) is not None:
        vision.append("vision_table")
    for kind, count in (*((kind, seen) for kind in vision), ("image_in_place", llm)):
        arms += [Arm(kind), *(Arm(kind, ONLY, block) for block in range(count))]
        arms += [Arm(kind, FROM, block) for block in range(1, count)]
    arms += [Arm("image_zero"), Arm("position_ids")]
    return arms + [Arm(f"tokens_{how}") for how in SHUFFLES]


class PositionAblations(Experiment):
    """Delete or shuffle positions, arm by arm."""

    name = "position_ablations"
    title = "What it costs to delete or shuffle positions"
    question = (
        "Which positions does the model need to say where things are: those of the vision tower (RoPE or a learned "
        "table, deleted in one block, from a block on, or in all), those of the image tokens in the language model, "
        "or their order? Each arm is compared with the model as it is on the same pictures; presence questions, "
        "which ask for no place, are the control."
    )

    def settings(self) -> dict[str, Any]:
        """How many pairs are asked about."""
        return {"most_pairs": MOST_PAIRS}

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """One unit per arm."""
        arms = {arm.name: arm for arm in arms_of(bench)}
        for name in pending(list(arms), rows, self.title):
            parts = bench.batches(first_items(bench, MOST_PAIRS))
            rows.write(name, [row for part in parts for row in _ask(bench, arms[name], part)])

    def summarize(self, table: pa.Table) -> list[Finding]:
        """One statement per kind and question on the arms that take all."""
        frame = table.to_pandas()
        effects = arm_effects(frame)
        findings = []
        for kind, what in KINDS.items():
            if (kind, "spatial") not in effects:
                continue
            loss, control = effects[kind, "spatial"], effects[kind, "presence"]
            findings.append(
                Finding(
                    f"Without {what}, fewer spatial questions are answered right",
                    loss.estimate,
                    judged_below(loss, TOLERANCE),
                    f"yes: interval below 0 and Holm p <= .05 over all arms and questions; no: loss of {TOLERANCE:g} "
                    "points excluded",
                    control.estimate,
                    "presence questions",
                    "points",
                )
            )
        return findings

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """Every arm against the untouched model."""
        frame = table.to_pandas()
        effects, lines = arm_effects(frame), []
        base = {
            name: rate(POINTS * on_items(frame, "correct", arm=BASELINE, question=name), pairs_of(frame))
            for name in QUESTIONS
        }
        lines.append(("model as it is: right, %", *(base[name] for name in QUESTIONS), "", "", ""))
        arms = frame.drop_duplicates("arm").set_index("arm")
        for arm in [name for name in arms.index if name != BASELINE]:
            spatial, presence = effects[arm, "spatial"], effects[arm, "presence"]
            margin = effects[arm, "margin"].estimate
            lines.append((arm, spatial.estimate, presence.estimate, margin, spatial.corrected, presence.corrected))
        columns = ("arm", "spatial, points", "presence, points", "spatial margin, nats", "Holm p", "Holm p, presence")
        return [
            ReportTable("Change of accuracy and of the margin of the right answer", columns, lines, _absent(frame))
        ]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """Losses by block and of the arms that take all."""
        from .position_ablation_figures import draw_by_block, draw_whole

        frame = table.to_pandas()
        effects = arm_effects(frame)
        return [
            draw_whole(effects, {kind: kind for kind in KINDS}, folder / f"{self.name}_whole.png"),
            draw_by_block(frame, effects, folder / f"{self.name}_by_block.png"),
        ]


def arm_effects(frame: pd.DataFrame) -> dict[tuple[str, str], Effect]:
    """(arm, question) -> change of accuracy in points, and (arm, "margin") -> of the spatial margin in nats.

    Holm's correction is over all arms and both questions, and by itself over the margins.
    """
    pairs = pairs_of(frame)
    accuracy, margins = {}, {}
    for arm in frame["arm"].unique():
        if arm == BASELINE:
            continue
        for question in QUESTIONS:
            change = _change(frame, "correct", arm, question, POINTS)
            accuracy[arm, question] = effect(change, pairs.loc[change.index], SMALLEST_CHANGE)
        change = _change(frame, "margin", arm, "spatial")
        margins[arm, "margin"] = effect(change, pairs.loc[change.index])
    return corrected(accuracy) | corrected(margins)


def _change(frame: pd.DataFrame, column: str, arm: str, question: str, scale: float = 1.0) -> pd.Series:
    before, after = (on_items(frame, column, arm=name, question=question) for name in (BASELINE, arm))
    return scale * (after.astype(float) - before.astype(float).loc[after.index])


def _ask(bench: Bench, arm: Arm, items: Sequence[WhereItem]) -> list[dict[str, Any]]:
    asked = {
        "spatial": [axis_question(item, bench.relations) for item in items],
        "presence": [item.presence for item in items],
    }
    rows = []
    with arm.context(bench, items):
        for name, questions in asked.items():
            scores = score_questions(bench, items, questions)
            answers = [question.answer for question in questions]
            margins, shares = option_margin(scores, answers), option_probabilities(scores)
            for number, item in enumerate(items):
                rows.append(
                    {
                        "arm": arm.name,
                        "kind": arm.kind,
                        "scope": arm.scope,
                        "block": arm.block,
                        "question": name,
                        "pair_id": item.pair_id,
                        "item": item.name,
                        "axis": item.axis,
                        "correct": int(margins[number] > 0),
                        "margin": float(margins[number]),
                        "probability": float(shares[number, answers[number]]),
                    }
                )
    return rows


def _absent(frame: pd.DataFrame) -> str:
    kinds = set(frame["kind"])
    notes = ["A change of 25 points is one picture of a pair's four."]
    if "vision_rotation" not in kinds:
        notes.append("The vision tower has no rotary positions to delete.")
    if "vision_table" not in kinds:
        notes.append("The vision tower has no learned position embeddings to delete.")
    return " ".join(notes)
