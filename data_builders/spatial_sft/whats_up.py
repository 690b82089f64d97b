"""Sets of four pictures in What's-Up form: two objects, the subject left of, right of, above, below the reference.

Nothing but the relation changes inside a set: objects, sizes, textures, backdrop, clutter, wording and the order of
the options are the same in its four pictures, so each option is right exactly once, and a reader of the words alone is
right once in four.

Positions. No placement makes both single positions tell nothing: were the subject's and the reference's mean positions
the same for "left" and for "right", so would be their difference, which contradicts the words. What can be had exactly
is had here, per *axis pair* (left/right or above/below): one of the two objects, the *anchor*, stands at the very same
place in both pictures of the pair, and the other one moves around it. In every set the subject anchors one axis pair
and the reference the other. A policy that looks at one object alone, whichever, therefore gives the same answer to
both pictures of one axis pair: it gets at most one of the two axis pairs of a set right, and never a whole set. What
is left on single pictures is measured by a test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dualstream.data_builders.scenes import COLORS, SHAPES, TEXTURES, Scene, SceneObject, make_scene, noun_phrases

RELATIONS = ("left", "right", "above", "below")
AXES = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
FORMS = ("word", "letter")
LETTERS = "ABCD"

RADIUS = (0.1, 0.12)  # half-width of an object in canvas units; lies within what other scenes show
GAP, SLACK = 0.02, 0.03  # free space between the two objects along the axis: GAP to GAP + SLACK
OFFSET = 0.25  # largest displacement across the axis, as a share of the displacement along it
SHARE = 0.5  # chance that the two objects have their colour or their shape in common

_WORDING = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class WhatsUpItem:
    """One picture of a set with its question.

    Attributes:
        scene: the picture; object 0 is the subject, object 1 the reference.
        relation: one of ``RELATIONS``, what the subject is to the reference.
        axis: ``horizontal`` or ``vertical``; the two pictures of a set that share it are a pair.
        anchor: ``subject`` or ``reference``, which of them stands still in the pair.
        subject: noun phrase of object 0.
        reference: noun phrase of object 1.
        order: the four relations in the order of the options.
    """

    scene: Scene
    relation: str
    axis: str
    anchor: str
    subject: str
    reference: str
    order: tuple[str, ...]

    def question(self, form: str = "word") -> str:
        """The question; ``word`` asks for the relation's name, ``letter`` for the letter of a sentence.

        Raises:
            ValueError: the form is unknown.
        """
        _check_form(form)
        if form == "word":
            first, second, third, last = (_WORDING[relation] for relation in self.order)
            return f"Is the {self.subject} {first}, {second}, {third} or {last} the {self.reference}?"
        sentences = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.options(), strict=True)]
        return "\n".join(["Which sentence describes the picture?", *sentences, "Answer with the letter."])

    def options(self) -> list[str]:
        """The four sentences in their order."""
        return [f"The {self.subject} is {_WORDING[relation]} the {self.reference}." for relation in self.order]

    def answer(self, form: str = "word") -> str:
        """The right answer: a relation's name or a letter.

        Raises:
            ValueError: the form is unknown.
        """
        _check_form(form)
        return self.relation if form == "word" else LETTERS[self.order.index(self.relation)]


def make_set(seed: int) -> list[WhatsUpItem]:
    """The four pictures of a seed, in the order of ``RELATIONS``; the same seed always gives the same set."""
    rng = random.Random(f"whats-up-{seed}")
    base = make_scene(seed, n_objects=1)  # its backdrop and clutter
    pair = _two_objects(rng)
    anchors = dict(zip(AXES, rng.sample(("subject", "reference"), 2), strict=True))
    order = tuple(rng.sample(RELATIONS, 4))
    placed: dict[str, tuple[SceneObject, SceneObject]] = {}
    for number, (axis, relations) in enumerate(AXES.items()):
        placed |= zip(relations, _place(pair, number, anchors[axis], rng), strict=True)
    phrases = noun_phrases(replace(base, objects=pair))
    subject, reference = rng.choice(phrases[0]), rng.choice(phrases[1])
    return [
        WhatsUpItem(replace(base, objects=placed[relation]), relation, axis, anchors[axis], subject, reference, order)
        for axis, relations in AXES.items()
        for relation in relations
    ]


def make_sets(seeds: range) -> Iterator[tuple[int, WhatsUpItem]]:
    """(seed, item) of every picture of the sets of some seeds, set by set."""
    for seed in seeds:
        for item in make_set(seed):
            yield seed, item


def _two_objects(rng: random.Random) -> tuple[SceneObject, SceneObject]:
    """Two objects that differ in colour or shape, exchangeable, not placed yet."""
    colors = tuple(COLORS)
    while True:
        looks = [(rng.choice(SHAPES), rng.choice(colors)) for _ in range(2)]
        if rng.random() < SHARE:
            common = rng.randrange(2)
            looks[1] = (looks[0][0], looks[1][1]) if common == 0 else (looks[1][0], looks[0][1])
        if looks[0] != looks[1]:
            break
    first, second = (
        SceneObject(shape, color, rng.choice(TEXTURES), 0.5, 0.5, rng.uniform(*RADIUS)) for shape, color in looks
    )
    return first, second


def _place(
    pair: tuple[SceneObject, SceneObject], axis: int, anchor: str, rng: random.Random
) -> Iterator[tuple[SceneObject, SceneObject]]:
    """Place subject and reference twice, first with the subject's coordinate along the axis (0: x, 1: y) smaller."""
    still = ("subject", "reference").index(anchor)
    moving = 1 - still
    own, other = pair[still].radius, pair[moving].radius
    distance = own + other + GAP + rng.uniform(0, SLACK)
    offset = rng.uniform(-OFFSET, OFFSET) * distance
    along = rng.uniform(distance + other, 1 - distance - other)
    across = rng.uniform(max(own, other - offset), 1 - max(own, other + offset))
    for side in (-1, 1):  # of the subject as seen from the reference
        step = side * distance if moving == 0 else -side * distance
        points = {still: (along, across), moving: (along + step, across + offset)}
        subject, reference = (_moved(pair[role], points[role], axis) for role in (0, 1))
        yield subject, reference


def _moved(item: SceneObject, point: tuple[float, float], axis: int) -> SceneObject:
    x, y = point if axis == 0 else point[::-1]
    return replace(item, x=x, y=y)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; accepted are {', '.join(FORMS)}.")
