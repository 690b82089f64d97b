"""One question of a spatial benchmark, and the orders in which its options can be shown."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

LETTERS = "ABCDEFGHI"
OPPOSITE = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "top": "bottom",
    "bottom": "top",
    "on": "under",
    "under": "on",
    "front": "behind",
    "behind": "front",
}


@dataclass(frozen=True)
class Item:
    """A picture with a question that has exactly one right option.

    Attributes:
        id: unique inside its task.
        image: file name inside the task's image folder, or what ``scene_tasks`` draws it from.
        options: what can be answered, as text.
        answer: index of the right option.
        question: what is asked before the options; empty where the options are descriptions of the picture.
        questions: the wording for every order of ``circular_orders``; empty unless the question names the options.
        relations: what each option says (``left``, ``on`` ...); empty where options say nothing of the kind.
        pair_id: the two items of a pair differ in the picture alone, which shows opposite relations.
        set_id: the items of all pairs of the same two objects.
        set_size: how many items a complete set has; 0: the task has no sets.
    """

    id: str
    image: str
    options: tuple[str, ...]
    answer: int
    question: str = ""
    questions: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    pair_id: str = ""
    set_id: str = ""
    set_size: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.options) or len(set(self.options)) != len(self.options):
            raise ValueError(f"item {self.id}: answer {self.answer} of options {self.options}, which must differ.")
        for name, values in (("relations", self.relations), ("questions", self.questions)):
            if values and len(values) != len(self.options):
                raise ValueError(f"item {self.id}: {len(values)} {name} for {len(self.options)} options.")


def circular_orders(n: int) -> list[tuple[int, ...]]:
    """The ``n`` rotations of ``0 .. n - 1``: every option stands once at every place.

    Raises:
        ValueError: ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an item has at least 1 option.")
    return [tuple((start + i) % n for i in range(n)) for start in range(n)]


def seeded_order(item_id: str, n: int) -> tuple[int, ...]:
    """A random order of ``n`` options that depends on nothing but the item's id."""
    seed = int.from_bytes(hashlib.sha256(f"option-order/{item_id}".encode()).digest()[:8], "big")
    return tuple(random.Random(seed).sample(range(n), n))
