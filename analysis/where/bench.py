"""What the experiments work on: a model with its processor, and pairs of objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.modeling.families import Family, family_of
from dualstream.modeling.lens import unwrapped
from dualstream.processing import build_inputs, token_geometry

from .items import ROLES, ObjectPair, PairSource, WhereItem

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from dualstream.processing import TokenGeometry

#: The paper's neutral prompt, for states that must not depend on a question.
NEUTRAL_PROMPT = "Describe the image."
MIN_COVERAGE = 0.5
QUESTIONS = ("spatial", "presence")


@dataclass
class Bench:
    """A model and what is asked of it.

    Attributes:
        model: a supported model in eval mode.
        processor: its processor.
        source: the pairs.
        seed: of everything random.
        batch_size: pictures per forward pass.
        name: what the model is called in results.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    source: PairSource
    seed: int = 0
    batch_size: int = 16
    name: str = ""

    def __post_init__(self) -> None:
        model: Any = unwrapped(self.model)
        self.model = model
        self._geometries: dict[tuple[int, int], TokenGeometry] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    @property
    def family(self) -> Family:
        """Where things are in the model."""
        return family_of(self.model)

    @property
    def pairs(self) -> tuple[ObjectPair, ...]:
        """The pairs figures are reported on, sorted by id."""
        return self.source.pairs

    @property
    def calibration(self) -> tuple[ObjectPair, ...]:
        """Pairs kept apart, to choose and to calibrate with."""
        return self.source.calibration

    @cached_property
    def items(self) -> list[WhereItem]:
        """All pictures of ``pairs``, pair by pair."""
        return [item for pair in self.pairs for item in pair.items]

    @property
    def relations(self) -> tuple[str, ...]:
        """Left, right, the relation of the higher object, that of the lower one."""
        return self.source.relations

    @property
    def vision_depth(self) -> int:
        """Number of blocks of the vision tower."""
        return len(self.family.vision_blocks(self.model))

    @property
    def llm_depth(self) -> int:
        """Number of blocks of the language model."""
        return len(self.family.llm_blocks(self.model))

    def geometry(self, size: tuple[int, int]) -> TokenGeometry:
        """Rectangles of the visual tokens of a picture of (width, height)."""
        if size not in self._geometries:
            self._geometries[size] = token_geometry(self.processor, size)
        return self._geometries[size]

    def size(self, item: WhereItem) -> tuple[int, int]:
        """(width, height) of a picture; a picture whose size nobody states is opened once."""
        if item.name not in self._sizes:
            self._sizes[item.name] = item.picture.size or item.image().size
        return self._sizes[item.name]

    def tokens(self, item: WhereItem, role: str, min_coverage: float = MIN_COVERAGE) -> np.ndarray:
        """Visual tokens of one of the two objects of a picture.

        A token belongs to an object that covers at least `min_coverage` of it, and to the one that covers more of it
        where both do; an object without such a token gets the ones it covers most.

        Args:
            item: the picture.
            role: ``subject`` or ``reference``.
            min_coverage: share of a token's rectangle.

        Returns:
            (n,) int64 indices into the picture's features, ascending, n >= 1, a thumbnail's tokens included.

        Raises:
            ValueError: no token sees the object.
        """
        size = self.size(item)
        coverage = np.stack([self._coverage(item, name, size) for name in ROLES])
        own, other = coverage[ROLES.index(role)], coverage[1 - ROLES.index(role)]
        mine = np.where(own > other, own, 0.0)
        if not mine.max() > 0:
            raise ValueError(f"no visual token of {item.name!r} sees the {role} ({item.object(role).name}).")
        return np.flatnonzero(mine >= min(min_coverage, mine.max()))

    def _coverage(self, item: WhereItem, role: str, size: tuple[int, int]) -> np.ndarray:
        thing, geometry = item.object(role), self.geometry(size)
        mask = thing.mask
        return geometry.coverage_of_box(thing.box) if mask is None else geometry.coverage_of_mask(mask)

    def inputs(self, items: Sequence[WhereItem], questions: Sequence[str] | str = NEUTRAL_PROMPT) -> BatchFeature:
        """Model inputs, left-padded, one picture and one question per row, on the model's device.

        Args:
            items: pictures.
            questions: one per picture, or one for all.
        """
        texts = [questions] * len(items) if isinstance(questions, str) else list(questions)
        inputs = build_inputs(self.processor, [item.image() for item in items], texts)
        inputs.pop("compression", None)
        return inputs.to(self.model.device)

    def batches(self, items: Sequence[WhereItem]) -> list[Sequence[WhereItem]]:
        """The items, ``batch_size`` at a time."""
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def log_likelihoods(self, items: Sequence[WhereItem], question: str = "spatial") -> np.ndarray:
        """Summed log-probability of every option of a question, one row per picture.

        Args:
            items: pictures.
            question: ``spatial`` or ``presence``.

        Returns:
            (n, options) float64 in nats, in the order of the question's options.
        """
        from dualstream.eval.option_scores import option_log_likelihoods

        if question not in QUESTIONS:
            raise ValueError(f"question={question!r}; accepted are {', '.join(QUESTIONS)}.")
        scores: list[np.ndarray] = []
        for batch in self.batches(items):
            asked = [getattr(item, question) for item in batch]
            scores += option_log_likelihoods(
                self.model,
                self.processor,
                [[item.image()] for item in batch],
                [each.text for each in asked],
                [list(each.options) for each in asked],
                batch_size=self.batch_size,
            )
        return np.stack(scores)

    def settings(self) -> dict[str, Any]:
        """What identifies rows made on this bench."""
        return {
            "model": self.name,
            "data": self.source.kind,
            "stand_in_images": self.source.stand_in,
            "seed": self.seed,
            "pairs": [pair.pair_id for pair in self.pairs],
            "calibration": [pair.pair_id for pair in self.calibration],
        }
