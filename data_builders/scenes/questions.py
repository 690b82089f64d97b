"""Questions and answers about a scene, balanced by construction.

Balance. Whether a statement is true ("yes") is drawn by a fair coin *before* the wording, independently of the
geometry; which of two options comes first and which direction is asked for are fair coins too. So the answer of every
yes/no and "which" question is independent of any one object's position, of all sizes and of the option order.

Two question types tell more, necessarily, and are kept apart by name. `where` asks for one object's own position.
`direction` ("left or right of?") names the direction itself: were both objects' positions independent of the answer,
the mean displacement between them would be the same for "left" and for "right", which contradicts the words. So one
position always carries some information there; preferring near pairs keeps it small, and the tests measure it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scene import COLORS, MAX_OBJECTS, SHAPES, TEXTURES, Scene, SceneObject

MARGIN = 0.12  # least distance of two centres along an axis (canvas units) for a relation to be asked
NEARNESS = 1.5  # a pair at distance d counts with chance (MARGIN / d)**NEARNESS: near pairs tell less by one position
EDGE = 0.03  # an object this near to a border of the 3 x 3 fields is not asked for its field

NUMBERS: tuple[str, ...] = tuple(str(i) for i in range(MAX_OBJECTS + 1))
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: One of :data:`KINDS`.
        form: The wording family inside the kind, e.g. "yes_no" or "which".
        text: The question as asked.
        answer: The short right answer, lower case.
        objects: Indices of the objects that decide it (empty where none does).
    """

    kind: str
    form: str
    text: str
    answer: str
    objects: tuple[int, ...] = ()


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """Draw one question of a kind, or None if this scene admits none of the drawn form.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in _ASK:
        raise ValueError(f"kind is {kind!r}; accepted are {', '.join(KINDS)}.")
    return _ASK[kind](scene, rng)


def questions(scene: Scene, rng: random.Random, kinds: tuple[str, ...] | None = None) -> list[Question]:
    """One question of every kind the scene admits, in the order of `kinds` (all of them by default)."""
    drawn = (_retry(scene, kind, rng) for kind in kinds or KINDS)
    return [question for question in drawn if question is not None]


def _retry(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    for _ in range(4):
        question = ask(scene, kind, rng)
        if question is not None:
            return question
    return None


def noun_phrases(scene: Scene) -> dict[int, list[str]]:
    """Every way to name each object that fits no other object: by shape, by colour and shape, by colour."""
    phrases: dict[int, list[str]] = {}
    for index, item in enumerate(scene.objects):
        others = [o for i, o in enumerate(scene.objects) if i != index]
        names = []
        if all(o.shape != item.shape for o in others):
            names.append(item.shape)
        if all((o.shape, o.color) != (item.shape, item.color) for o in others):
            names.append(f"{item.color} {item.shape}")
        if all(o.color != item.color for o in others):
            names.append(f"{item.color} object")
        if names:
            phrases[index] = names
    return phrases


def caption(scene: Scene) -> str:
    """All objects from left to right, e.g. "a striped red circle and a solid blue star"."""
    ordered = sorted(scene.objects, key=lambda item: item.x)
    parts = [f"a {item.texture} {item.color} {item.shape}" for item in ordered]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _a(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _plural(phrase: str) -> str:
    return f"{phrase}es" if phrase.endswith("s") else f"{phrase}s"


def _fits(item: SceneObject, color: str | None, shape: str | None) -> bool:
    return color in (None, item.color) and shape in (None, item.shape)


def _phrase(color: str | None, shape: str | None) -> str:
    return " ".join(part for part in (color, shape or "object") if part)


def _pattern(scene: Scene, rng: random.Random, present: bool) -> tuple[str | None, str | None] | None:
    """A (colour, shape) description that fits some object, or none (then mixed from present parts at times)."""
    form = rng.choice(("color", "shape", "both", "both"))
    source = rng.choice(scene.objects)
    color, shape = source.color, source.shape
    if not present:
        mixed = form == "both" and rng.random() < 0.7
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if mixed and rng.random() < 0.5:
            color = source.color
        elif mixed:
            shape = source.shape
    pattern = (None if form == "shape" else color, None if form == "color" else shape)
    fits = any(_fits(item, *pattern) for item in scene.objects)
    return pattern if fits == present else None


def _presence(scene: Scene, rng: random.Random) -> Question | None:
    present = rng.random() < 0.5
    pattern = _pattern(scene, rng, present)
    while pattern is None:
        pattern = _pattern(scene, rng, present)
    text = rng.choice(
        (
            "Is there {x}?",
            "Is there {x} in the image?",
            "Do you see {x}?",
            "Does the picture show {x}?",
            "Can you see {x} in the picture?",
        )
    )
    seen = tuple(i for i, item in enumerate(scene.objects) if _fits(item, *pattern))
    return Question("presence", "yes_no", text.format(x=_a(_phrase(*pattern))), "yes" if present else "no", seen)


def _attribute(scene: Scene, rng: random.Random) -> Question | None:
    form = rng.choice(("color", "shape", "texture", "yes_no"))
    phrases = noun_phrases(scene)
    if form == "shape":
        fit = [i for i, names in phrases.items() if names[-1].endswith("object")]
    elif form == "texture":
        fit = list(phrases)
    else:
        fit = [i for i, names in phrases.items() if names[0] == scene.objects[i].shape]
    if not fit:
        return None
    index = rng.choice(fit)
    item = scene.objects[index]
    if form == "shape":
        text = rng.choice(
            ("What shape is the {c} object?", "What is the shape of the {c} object?", "Which shape is {c}?")
        )
        return Question("attribute", form, text.format(c=item.color), item.shape, (index,))
    if form == "texture":
        options = rng.sample(TEXTURES, 3)
        text = rng.choice(
            ("What pattern does the {x} have?", "What texture is the {x}?", "Is the {x} {0}, {1} or {2}?")
        )
        name = rng.choice(phrases[index])
        return Question("attribute", form, text.format(*options, x=name), item.texture, (index,))
    if form == "color":
        text = rng.choice(("What color is the {x}?", "Which color does the {x} have?", "Name the color of the {x}."))
        return Question("attribute", form, text.format(x=item.shape), item.color, (index,))
    true = rng.random() < 0.5
    color = item.color if true else rng.choice([c for c in COLORS if c != item.color])
    text = rng.choice(("Is the {x} {c}?", "Is the color of the {x} {c}?", "Does the {x} look {c}?"))
    return Question("attribute", form, text.format(x=item.shape, c=color), "yes" if true else "no", (index,))


def _count(scene: Scene, rng: random.Random) -> Question | None:
    pattern: tuple[str | None, str | None] = (None, None)
    if rng.random() < 0.75:
        source = rng.choice(scene.objects)
        by_color = rng.random() < 0.5
        pattern = (source.color, None) if by_color else (None, source.shape)
        if rng.random() < 0.2:
            pattern = (rng.choice(tuple(COLORS)), None) if by_color else (None, rng.choice(SHAPES))
    seen = tuple(i for i, item in enumerate(scene.objects) if _fits(item, *pattern))
    text = rng.choice(("How many {x} are there?", "How many {x} do you see?", "Count the {x}."))
    form = "all" if pattern == (None, None) else "some"
    return Question("count", form, text.format(x=_plural(_phrase(*pattern))), NUMBERS[len(seen)], seen)


def _field(value: float, extent: float) -> int | None:
    """Which third of the canvas a coordinate lies in, None next to a border between two thirds."""
    third = 3 * value / extent
    near = min(abs(third - 1), abs(third - 2)) / 3 < EDGE
    return None if near else min(2, int(third))


def _where(scene: Scene, rng: random.Random) -> Question | None:
    phrases = noun_phrases(scene)
    if not phrases:
        return None
    index = rng.choice(list(phrases))
    item, name = scene.objects[index], rng.choice(phrases[index])
    if rng.random() < 0.3:
        value, words = rng.choice(((item.x / scene.width, ("left", "right")), (item.y / scene.height, ROWS[::2])))
        if abs(value - 0.5) < EDGE:
            return None
        first, second = rng.sample(words, 2)
        text = rng.choice(("Is the {x} at the {0} or at the {1}?", "Is the {x} in the {0} or {1} half?"))
        return Question("where", "half", text.format(first, second, x=name), words[value > 0.5], (index,))
    row, column = _field(item.y, scene.height), _field(item.x, scene.width)
    if row is None or column is None:
        return None
    text = rng.choice(
        ("Where is the {x}?", "Where is the {x} in the image?", "In which part of the picture is the {x}?")
    )
    return Question("where", "field", text.format(x=name), f"{ROWS[row]} {COLUMNS[column]}", (index,))


#: axis -> (word if the subject's coordinate is smaller, if larger)
_DIRECTIONS = (("left", "right"), ("above", "below"))
_STATEMENT = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
_SUPERLATIVE = {"left": "further left", "right": "further right", "above": "higher", "below": "lower"}


def _pair(scene: Scene, rng: random.Random) -> tuple[int, int, int, str, str] | None:
    """An ordered pair of nameable objects apart along an axis: indices, axis and noun phrases."""
    phrases = noun_phrases(scene)
    pairs = []
    for i in phrases:
        for j in phrases:
            a, b = scene.objects[i], scene.objects[j]
            for axis, distance in enumerate((abs(a.x - b.x), abs(a.y - b.y))):
                if i != j and distance >= MARGIN and rng.random() < (MARGIN / distance) ** NEARNESS:
                    pairs.append((i, j, axis))
    if not pairs:
        return None
    i, j, axis = rng.choice(pairs)
    return i, j, axis, rng.choice(phrases[i]), rng.choice(phrases[j])


def _relation_word(scene: Scene, i: int, j: int, axis: int) -> str:
    a, b = scene.objects[i], scene.objects[j]
    smaller = (a.x < b.x) if axis == 0 else (a.y < b.y)
    return _DIRECTIONS[axis][0 if smaller else 1]


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    pair = _pair(scene, rng)
    if pair is None:
        return None
    i, j, axis, first, second = pair
    word = _relation_word(scene, i, j, axis)
    opposite = _DIRECTIONS[axis][word == _DIRECTIONS[axis][0]]
    if rng.random() < 0.5:
        true = rng.random() < 0.5
        statement = rng.choice(_STATEMENT[word if true else opposite])
        text = rng.choice(
            ("Is the {a} {r} the {b}?", "Does the {a} lie {r} the {b}?", "Is it true that the {a} is {r} the {b}?")
        )
        answer = "yes" if true else "no"
        return Question("relation", "yes_no", text.format(a=first, b=second, r=statement), answer, (i, j))
    asked = rng.choice((word, opposite))
    text = rng.choice(("Which is {s}, the {a} or the {b}?", "Which one is {s}: the {a} or the {b}?"))
    answer = first if asked == word else second
    return Question("relation", "which", text.format(s=_SUPERLATIVE[asked], a=first, b=second), answer, (i, j))


def _direction(scene: Scene, rng: random.Random) -> Question | None:
    pair = _pair(scene, rng)
    if pair is None:
        return None
    i, j, axis, first, second = pair
    options = rng.sample(_DIRECTIONS[axis], 2)
    if axis == 0:
        text = rng.choice(("Is the {a} {0} or {1} of the {b}?", "Is the {a} to the {0} or to the {1} of the {b}?"))
    else:
        text = rng.choice(("Is the {a} {0} or {1} the {b}?", "Does the {a} lie {0} or {1} the {b}?"))
    answer = _relation_word(scene, i, j, axis)
    return Question("direction", "option", text.format(*options, a=first, b=second), answer, (i, j))


def _caption(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(("Describe the image.", "What is in the picture?", "Write a caption."))
    return Question("caption", "list", text, caption(scene), tuple(range(len(scene.objects))))


_ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "presence": _presence,
    "attribute": _attribute,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "direction": _direction,
    "caption": _caption,
}
KINDS: tuple[str, ...] = tuple(_ASK)
