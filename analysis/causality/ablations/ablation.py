"""The ablation experiment on a chunk of pictures: every condition in every setting, as rows of large batches.

A picture is encoded once. All conditions of all pictures of a chunk then run together, each as one row whose chosen
visual tokens are replaced before the language model (or at a depth of it) reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.analysis.interventions import edited_features, edited_states, encoded_images
from dualstream.analysis.object_tokens import object_tokens
from dualstream.modeling.lens import unwrapped
from dualstream.processing import token_geometry
from dualstream.processing.token_boxes import TokenGeometry

from ..prompt_rows import feature_layers, prompt_rows, visual_counts
from ..settings import Outcome, Query, answer, answer_forward, prepare, query_of, right_token
from ..targets import Target
from .attribution import Attribution, attribution_patching, integrated_gradients
from .replacement import KINDS, Reference, replacing
from .selection import Condition, attention_received, object_conditions, ranked_conditions, standing_out

BASELINE = Condition("none", 0, np.zeros(0, dtype=np.int64))
ARM_CONDITIONS = ("object", "object+1", "translated+1", "all")
CONNECTOR = -1


@dataclass(frozen=True)
class Arm:
    """How tokens are replaced.

    Attributes:
        replacement: one of ``KINDS``.
        depth: blocks of the language model executed before; -1: at the connector (and deepstack) output.
    """

    replacement: str = "mean"
    depth: int = CONNECTOR


@dataclass(frozen=True)
class AblationPlan:
    """What to run; all of it decides the rows.

    Attributes:
        settings: ways of asking.
        rings: ring widths around the object.
        counts: sizes of random and ranked sets.
        draws: draws of the controls that are matched to the object.
        coverage: share of a token that the object must cover; 0: any overlap.
        ig_steps: points of integrated gradients; 0 leaves attribution conditions out.
        arms: the first runs every condition with generated answers; with more than one, all run ``ARM_CONDITIONS``
            with answers by the first token.
        max_new_tokens: longest description in the generative setting.
        rows_per_pass: rows of one batch.
        seed: of all draws.
    """

    settings: tuple[str, ...] = ("generative", "polling", "vqa")
    rings: tuple[int, ...] = (0, 1, 2)
    counts: tuple[int, ...] = (5, 10, 20, 40)
    draws: int = 2
    coverage: float = 0.0
    ig_steps: int = 8
    arms: tuple[Arm, ...] = (Arm(),)
    max_new_tokens: int = 64
    rows_per_pass: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.settings or not self.arms or self.draws < 1 or self.ig_steps < 0:
            raise ValueError("a plan needs a setting, an arm, draws of 1 or more and ig_steps of 0 or more.")
        unknown = [arm.replacement for arm in self.arms if arm.replacement not in KINDS]
        if unknown:
            raise ValueError(f"replacement={unknown[0]!r} is unknown; accepted are {', '.join(KINDS)}.")

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of the language model at which something is replaced."""
        return tuple(sorted({arm.depth for arm in self.arms if arm.depth != CONNECTOR}))


@dataclass
class Picture:
    """A target with what is computed once for it."""

    target: Target
    image: Any
    geometry: TokenGeometry
    tokens: np.ndarray


def open_picture(processor: Any, target: Target, coverage: float = 0.0) -> Picture:
    """Open a target's picture and find its object's tokens; none where the processor cropped the object away."""
    image = target.image.image()
    geometry = token_geometry(processor, image.size)
    tokens = object_tokens(geometry, target.object.mask, target.object.box, coverage)
    return Picture(target, image, geometry, tokens)


def ablate_targets(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Picture],
    plan: AblationPlan,
    reference: Reference,
) -> list[dict[str, Any]]:
    """Run all conditions of a plan on some pictures.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        processor: its processor.
        pictures: of ``open_picture``, each with at least one object token.
        plan: what to run.
        reference: replacement values at the connector and at all depths of the plan.

    Returns:
        One row per picture, setting, condition and arm; see ``_row`` for the columns. The rows of a chunk are the same
        whatever ran before.
    """
    model = unwrapped(model)
    chunk = _Chunk(model, processor, list(pictures), plan, reference)
    rows: list[dict[str, Any]] = []
    for setting in plan.settings:
        work = chunk.conditions(setting)
        rows += chunk.run(setting, work, plan.arms[0], generate=True)
        if len(plan.arms) > 1 and setting != "generative":
            few = [(p, c) for p, c in work if c.draw == 0 and c.name in (BASELINE.name, *ARM_CONDITIONS)]
            for arm in plan.arms:
                rows += chunk.run(setting, few, arm, generate=False)
    return rows


class _Chunk:
    """Pictures that run together."""

    def __init__(
        self, model: nn.Module, processor: Any, pictures: list[Picture], plan: AblationPlan, reference: Reference
    ) -> None:
        self.model: Any = model
        self.processor, self.pictures = processor, pictures
        self.plan, self.reference = plan, reference
        self.output: Any = None
        self.prompts: dict[str, tuple[list[Query], Any]] = {}
        self.attributed: dict[str, dict[str, list[Attribution]]] = {}

    def prompt(self, setting: str) -> tuple[list[Query], Any]:
        """Queries and model inputs of a setting; the pictures are encoded with the first one."""
        if setting not in self.prompts:
            limit = self.plan.max_new_tokens if setting == "generative" else None
            queries = [query_of(picture.target, setting, max_new_tokens=limit) for picture in self.pictures]
            images = [picture.image for picture in self.pictures]
            inputs = prepare(self.processor, images, queries).to(self.model.device)
            if self.output is None:
                with torch.no_grad():
                    self.output = encoded_images(self.model, inputs)
            self.prompts[setting] = (queries, inputs)
        return self.prompts[setting]

    def attributions(self, setting: str) -> dict[str, list[Attribution]]:
        """Attributions to the right answer's first token; descriptions have none and use the polling question's."""
        setting = "polling" if setting == "generative" else setting
        if setting not in self.attributed:
            queries, inputs = self.prompt(setting)
            ids = [right_token(self.processor, query) for query in queries]
            given = (self.model, inputs, self.output, ids, self.reference)
            self.attributed[setting] = {
                "ig": integrated_gradients(*given, steps=self.plan.ig_steps),
                "attribution": attribution_patching(*given),
            }
        return self.attributed[setting]

    def conditions(self, setting: str) -> list[tuple[int, Condition]]:
        """Baseline and all conditions of every picture, with the picture's number."""
        _, inputs = self.prompt(setting)
        features = feature_layers(self.output)[0][2].split(visual_counts(self.model, inputs))
        received = attention_received(self.model, inputs, self.output)
        work: list[tuple[int, Condition]] = []
        for number, picture in enumerate(self.pictures):
            found = object_conditions(
                picture.geometry,
                picture.tokens,
                picture.target.image.name,
                self.plan.seed,
                self.plan.rings,
                self.plan.draws,
                self.plan.counts,
            )
            norms = features[number].float().norm(dim=-1).cpu().numpy()
            found.append(Condition("register-norm", 0, standing_out(norms)))
            found.append(Condition("register-attention", 0, standing_out(received[number])))
            if self.plan.ig_steps:
                sizes = {c.name: len(c.tokens) for c in found if c.name in ("object", "object+1")}
                for kind, attributions in self.attributions(setting).items():
                    ranking = attributions[number].ranking("magnitude" if kind == "ig" else "signed")
                    found += ranked_conditions(kind, ranking, sizes, self.plan.counts if kind == "ig" else ())
            work += [(number, condition) for condition in [BASELINE, *found]]
        return work

    def run(
        self, setting: str, work: list[tuple[int, Condition]], arm: Arm, generate: bool
    ) -> Iterator[dict[str, Any]]:
        """Answer every piece of work."""
        queries, inputs = self.prompt(setting)
        for begin in range(0, len(work), self.plan.rows_per_pass):
            part = work[begin : begin + self.plan.rows_per_pass]
            index = [number for number, _ in part]
            own = [self.pictures[number] for number in index]
            edit = replacing(
                self.reference,
                arm.replacement,
                [condition.tokens for _, condition in part],
                [picture.geometry for picture in own],
                [picture.target.image.name for picture in own],
                self.plan.seed,
            )
            rows = prompt_rows(self.model, inputs, self.output, index)
            asked = [queries[number] for number in index]
            place = (
                edited_features(self.model, edit)
                if arm.depth == CONNECTOR
                else edited_states(self.model, arm.depth, edit)
            )
            with torch.no_grad(), place:
                outcomes = (answer if generate else answer_forward)(self.model, self.processor, rows, asked)
            for (number, condition), outcome in zip(part, outcomes, strict=True):
                yield self._row(setting, number, condition, arm, generate, outcome)

    def _row(
        self, setting: str, number: int, condition: Condition, arm: Arm, generate: bool, outcome: Outcome
    ) -> dict[str, Any]:
        picture = self.pictures[number]
        kind = condition.name.partition("-")[0]
        ranked = self.attributions(setting)[kind][number] if kind in ("ig", "attribution") else None
        return {
            "image": picture.target.image.name,
            "object": picture.target.name,
            "setting": setting,
            "condition": condition.name,
            "draw": condition.draw,
            "replacement": arm.replacement,
            "depth": arm.depth,
            "method": "generate" if generate else "first-token",
            "n_tokens": len(condition.tokens),
            "n_visual": len(picture.geometry),
            "n_object": int(np.isin(condition.tokens, picture.tokens).sum()),
            "tokens": condition.tokens.tolist(),
            **outcome.to_dict(),
            "attribution_change": None if ranked is None else ranked.change,
            "attribution_error": None if ranked is None else ranked.error,
        }
