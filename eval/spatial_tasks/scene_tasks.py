"""Items on synthetic scenes: no files, no network, any number of them, from the test seeds only.

The questions are plain sentences with short answers, as the embedded models know them. Each scene has one question, so
items are independent, but for the What's-Up form, whose sets of four pictures differ in nothing but the relation.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING

from dualstream.data_builders.scenes import COLORS, SHAPES, SPLIT_SEEDS, TEXTURES, Question, ask, make_scene, render
from dualstream.data_builders.scenes.questions import COLUMNS, NUMBERS, ROWS
from dualstream.data_builders.spatial_sft import WhatsUpItem, make_set

from .items import Item, circular_orders
from .prompts import named_options, rename_options

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("presence", "attribute", "count", "where", "relation")
COUNT_VARIABLE = "DUALSTREAM_SCENES"
DEFAULT_COUNT = 400
IMAGE_SIZE = 224
_FIELDS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)


def scene_count() -> int:
    """How many items a task on scenes has: ``DUALSTREAM_SCENES``, 400 by default, a multiple of 4.

    Raises:
        ValueError: it is not a positive multiple of 4.
    """
    text = os.environ.get(COUNT_VARIABLE, str(DEFAULT_COUNT))
    if not text.isdecimal() or int(text) < 1 or int(text) % 4:
        raise ValueError(f"{COUNT_VARIABLE} is {text!r}; accepted are positive multiples of 4.")
    return int(text)


def scene_items(kind: str, count: int) -> list[Item]:
    """Questions of a kind, each on a test scene of its own.

    Args:
        kind: one of ``KINDS``.
        count: how many.
    """
    rng = random.Random(f"scenes-{kind}")
    items: list[Item] = []
    while len(items) < count:
        seed = rng.choice(SPLIT_SEEDS["test"])
        question = ask(make_scene(seed), kind, rng)
        options = () if question is None else answer_options(question)
        if question is not None and options:
            items.append(_item(f"scenes_{kind}-{len(items)}", seed, question, options))
    return items


def _item(name: str, seed: int, question: Question, options: tuple[str, ...]) -> Item:
    wordings: tuple[str, ...] = ()
    if named_options(question.text, options):
        wordings = tuple(rename_options(question.text, options, order) for order in circular_orders(len(options)))
    return Item(name, f"scene/{seed}", options, options.index(question.answer), question.text, wordings)


def answer_options(question: Question) -> tuple[str, ...]:
    """Everything that could answer a question about a scene, in its own order if it names them.

    Empty where the question does not say it: a "which" question is answered by one of its two noun phrases.
    """
    if question.answer in ("yes", "no"):
        return ("yes", "no")
    if question.form == "which":
        return _two_phrases(question)
    candidates: tuple[str, ...] = {
        "color": tuple(COLORS),
        "shape": SHAPES,
        "texture": TEXTURES,
        "half": ("left", "right") if question.answer in ("left", "right") else ("top", "bottom"),
        "field": _FIELDS,
    }.get(question.form, NUMBERS)
    named = named_options(question.text, candidates)
    return tuple(candidates[index] for index in named) if named else candidates


def _two_phrases(question: Question) -> tuple[str, ...]:
    """The two noun phrases of a question like "Which is higher, the red star or the ring?"."""
    _, _, tail = question.text.rstrip("?").replace(": the ", ", the ").partition(", the ")
    first, _, second = tail.partition(" or the ")
    return (first, second) if question.answer in (first, second) else ()


def whats_up_items(count: int, lettered: bool = False) -> list[Item]:
    """Sets of four scenes in What's-Up form.

    Args:
        count: how many items, a multiple of 4.
        lettered: choose among four sentences instead of naming the relation.
    """
    task = "scenes_whatsup_letters" if lettered else "scenes_whatsup"
    start = SPLIT_SEEDS["test"].start
    items: list[Item] = []
    for seed in range(start, start + count // 4):
        for number, scene in enumerate(make_set(seed)):
            items.append(_whats_up(f"{task}-{len(items)}", f"set/{seed}/{number}", seed, scene, lettered))
    return items


def _whats_up(name: str, image: str, seed: int, scene: WhatsUpItem, lettered: bool) -> Item:
    orders = [tuple(scene.order[index] for index in order) for order in circular_orders(len(scene.order))]
    return Item(
        id=name,
        image=image,
        options=tuple(scene.options()) if lettered else scene.order,
        answer=scene.order.index(scene.relation),
        question="Which sentence describes the picture?" if lettered else scene.question("word"),
        questions=() if lettered else tuple(replace(scene, order=order).question("word") for order in orders),
        relations=scene.order,
        pair_id=f"{seed}/{scene.axis}",
        set_id=str(seed),
        set_size=4,
    )


def draw(image: str, size: int = IMAGE_SIZE) -> Image:
    """The picture of an item, from its ``image`` entry."""
    kind, *numbers = image.split("/")
    if kind == "scene":
        return render(make_scene(int(numbers[0])), size)
    return render(make_set(int(numbers[0]))[int(numbers[1])].scene, size)
