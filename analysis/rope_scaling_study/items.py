"""The questions of the study: What's-Up sets under every condition, their mirror images, and training rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dualstream.data_builders.spatial_sft import AXES, WhatsUpItem, make_set

from .design import OUT, Condition, Study

if TYPE_CHECKING:
    from datasets import Dataset

    from dualstream.data_builders.scenes import Scene

MIRRORED = {"left": "right", "right": "left", "above": "above", "below": "below"}
_TWO_WAY = {
    "horizontal": "Is the {a} {0} or {1} of the {b}?",
    "vertical": "Is the {a} {0} or {1} the {b}?",
}


@dataclass(frozen=True)
class Item:
    """A question about a picture.

    Attributes:
        set_id: number of the object pair; it is the same under all conditions.
        condition: name of the condition.
        form: ``four-way`` or ``two-way``.
        mirrored: whether the picture is the mirror image.
        relation: the relation in the picture before mirroring.
        truth: the relation in the picture.
        question: the question.
        options: the words to choose from, in the order of the question.
        image: the picture.
    """

    set_id: int
    condition: str
    form: str
    mirrored: bool
    relation: str
    truth: str
    question: str
    options: tuple[str, ...]
    image: Image.Image


def placed(items: list[WhatsUpItem], condition: Condition, set_id: int) -> list[WhatsUpItem]:
    """The scenes of a set on the canvas of a condition: shrunk together and put at one random place.

    All pictures of the set get the same place, so that what stands still inside a pair stays still.

    Args:
        items: the set.
        condition: the condition.
        set_id: its parity tells which way an oblong canvas lies; it also seeds the place.
    """
    upright = set_id % 2 == 1
    width, height = (1.0, condition.aspect) if upright else (condition.aspect, 1.0)
    rng = random.Random(f"{condition.name}-{set_id}")
    x, y = rng.uniform(0, width - condition.scale), rng.uniform(0, height - condition.scale)

    def stretched(point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * width, point[1] * height

    def moved(item: WhatsUpItem) -> Scene:
        objects = tuple(
            replace(o, x=x + o.x * condition.scale, y=y + o.y * condition.scale, radius=o.radius * condition.scale)
            for o in item.scene.objects
        )
        clutter = tuple(
            replace(speck, start=stretched(speck.start), end=stretched(speck.end)) for speck in item.scene.clutter
        )
        return replace(item.scene, width=width, height=height, objects=objects, clutter=clutter)

    return [replace(item, scene=moved(item)) for item in items]


def question(item: WhatsUpItem, form: str) -> tuple[str, tuple[str, ...]]:
    """The question of a form and its options in the order in which it names them."""
    if form == "four-way":
        return item.question("word"), item.order
    options = tuple(relation for relation in item.order if relation in AXES[item.axis])
    return _TWO_WAY[item.axis].format(*options, a=item.subject, b=item.reference), options


def draw_items(
    condition: Condition, forms: tuple[str, ...], sets: int, split: str, mirrored: bool = False
) -> Iterator[Item]:
    """All questions of a condition, set by set.

    Args:
        condition: the condition.
        forms: how the questions are put.
        sets: number of sets.
        split: ``validation`` or ``test``; they have no scene in common.
        mirrored: ask about the mirror images instead.
    """
    from dualstream.data_builders.spatial_sft import split_range

    for set_id, seed in enumerate(split_range(split, 0, sets)):
        for item in placed(make_set(seed), condition, set_id):
            image = picture(item, condition, mirrored)
            truth = MIRRORED[item.relation] if mirrored else item.relation
            for form in forms:
                text, options = question(item, form)
                yield Item(set_id, condition.name, form, mirrored, item.relation, truth, text, options, image)


def picture(item: WhatsUpItem, condition: Condition, mirrored: bool = False) -> Image.Image:
    """The picture of an item, or its mirror image (left and right exchanged)."""
    from dualstream.data_builders.scenes import rasterize

    pixels = rasterize(item.scene, condition.pixels).image
    return Image.fromarray(np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels)


def training_rows(study: Study) -> Dataset:
    """Conversations to fine-tune on: training sets under all conditions that are not ``out``, the forms in turn."""
    from datasets import Dataset, Features, Image, List

    from dualstream.data_builders.spatial_sft import WHATS_UP_FEATURES, conversation, split_range

    rows: list[dict[str, Any]] = []
    for condition in (c for c in study.conditions if c.distribution != OUT):
        for set_id, seed in enumerate(split_range("train", 0, study.sft_sets)):
            form = study.forms[set_id // 2 % len(study.forms)]
            for item in placed(make_set(seed), condition, set_id):
                messages = conversation(question(item, form)[0], item.relation)
                rows.append({"messages": messages, "images": [picture(item, condition)]})
    features = Features({"messages": WHATS_UP_FEATURES["messages"], "images": List(Image())})
    return Dataset.from_list(rows, features=features)
