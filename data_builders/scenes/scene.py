"""Vector description of a synthetic scene, sampled deterministically from a seed.

Coordinates are in *canvas units*: the shorter side of the canvas is 1, x grows to the right, y grows downwards. A
scene can therefore be rendered at any size (:mod:`.render`) and asked about without any pixels (:mod:`.questions`).
"""

import math
import random
from dataclasses import dataclass

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 134, 20),
    "yellow": (245, 216, 32),
    "green": (38, 150, 52),
    "cyan": (40, 200, 210),
    "blue": (36, 76, 214),
    "purple": (128, 44, 168),
    "pink": (248, 130, 190),
}
TEXTURES: tuple[str, ...] = ("solid", "striped", "dotted")
MAX_OBJECTS = 6

#: Seeds of every split. The ranges are disjoint, so no scene of one split can occur in another.
SPLIT_SEEDS: dict[str, range] = {
    "train": range(0, 1_000_000_000),
    "validation": range(1_000_000_000, 1_100_000_000),
    "test": range(1_100_000_000, 1_200_000_000),
}

RADIUS = (0.1, 0.14)  # half-width of an object
GAP = 0.02  # least free space between the boxes of two objects
SHARE = 0.5  # chance that an object borrows the colour or the shape of an earlier one (a matched distractor)


@dataclass(frozen=True)
class SceneObject:
    """One named object: what it looks like, its centre and its half-width in canvas units."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Clutter:
    """A speck or a thin line that no object word names: all points within `thickness` of a segment."""

    start: tuple[float, float]
    end: tuple[float, float]
    thickness: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """A flat, shaded or wavy backdrop: `first` blends into `second` by a ramp or a wave along `angle` (radians)."""

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    frequency: float


@dataclass(frozen=True)
class Scene:
    """A whole picture. `width` and `height` are canvas units with min(width, height) = 1."""

    seed: int
    width: float
    height: float
    objects: tuple[SceneObject, ...]
    clutter: tuple[Clutter, ...]
    background: Background


def split_seeds(split: str, n: int, start: int = 0) -> range:
    """The seeds of scenes `start` to `start + n` of a split.

    Raises:
        ValueError: If the split is unknown or too short.
    """
    if split not in SPLIT_SEEDS:
        raise ValueError(f"split is {split!r}; accepted are {', '.join(SPLIT_SEEDS)}.")
    if not 0 <= start <= start + n <= len(SPLIT_SEEDS[split]):
        raise ValueError(
            f"scenes {start} to {start + n} were asked of split {split!r}, which has {len(SPLIT_SEEDS[split])}."
        )
    return SPLIT_SEEDS[split][start : start + n]


def make_scene(seed: int, aspect: float = 1.0, n_objects: int | None = None) -> Scene:
    """Sample the scene of a seed.

    Args:
        seed: Any non-negative integer; the same arguments always give the same scene.
        aspect: Width divided by height of the canvas, between 0.2 and 5.
        n_objects: 1 to 6, or None to draw it uniformly.

    Raises:
        ValueError: If `aspect` or `n_objects` lies outside its range.
    """
    if not 0.2 <= aspect <= 5:
        raise ValueError(f"aspect is {aspect}; accepted are numbers from 0.2 to 5 (width / height).")
    if n_objects is not None and not 1 <= n_objects <= MAX_OBJECTS:
        raise ValueError(f"n_objects is {n_objects}; accepted are 1 to {MAX_OBJECTS}, or None for a random number.")
    rng = random.Random(seed)
    width, height = max(1.0, aspect), max(1.0, 1 / aspect)
    count = rng.randint(1, MAX_OBJECTS) if n_objects is None else n_objects
    # Every scene gets a layout for six objects and keeps a random part of it: neither a position nor a size says
    # anything about how many objects there are, nor about an object's rank among them.
    radii = [rng.uniform(*RADIUS) for _ in range(MAX_OBJECTS)]
    centres = _place(radii, width, height, rng)
    kinds: list[tuple[str, str]] = []
    for _ in range(count):
        kinds.append(_kind(kinds, rng))
    objects = tuple(
        SceneObject(shape, color, rng.choice(TEXTURES), *centres[slot], radii[slot])
        for (shape, color), slot in zip(kinds, rng.sample(range(MAX_OBJECTS), count), strict=True)
    )
    background = _background(rng)
    return Scene(seed, width, height, objects, _clutter(width, height, background, rng), background)


def _kind(earlier: list[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
    shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    if earlier and rng.random() < SHARE:
        other = rng.choice(earlier)
        if rng.random() < 0.5:
            shape = other[0]
        else:
            color = other[1]
    return shape, color


def _place(radii: list[float], width: float, height: float, rng: random.Random) -> list[tuple[float, float]]:
    """Uniform centres with pairwise disjoint boxes. Only positions are redrawn, so sizes keep their law."""
    while True:
        centres: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(30):
                x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
                if all(
                    max(abs(x - a), abs(y - b)) >= radius + r + GAP for (a, b), r in zip(centres, radii, strict=False)
                ):
                    centres.append((x, y))
                    break
            else:
                break
        if len(centres) == len(radii):
            return centres


def _muted(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    """A nearly grey colour, so that neither backdrop nor clutter could be called by an object's colour word."""
    grey = rng.randint(low, high)
    return tuple(min(255, max(0, grey + rng.randint(-9, 9))) for _ in range(3))  # type: ignore[return-value]


def _background(rng: random.Random) -> Background:
    low, high = rng.choice(((195, 250), (195, 250), (105, 150), (12, 60)))
    kind = rng.choice(("flat", "ramp", "waves"))
    return Background(
        kind, _muted(rng, low, high), _muted(rng, low, high), rng.uniform(0, 2 * math.pi), rng.uniform(1, 6)
    )


def _clutter(width: float, height: float, background: Background, rng: random.Random) -> tuple[Clutter, ...]:
    dark_backdrop = sum(background.first) < 3 * 100
    items = []
    for _ in range(rng.choice((0, 0, 2, 4, 6, 8))):
        x, y, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, math.pi)
        length = rng.choice((0.0, 0.0, rng.uniform(0.04, 0.16)))
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        rgb = _muted(rng, 150, 240) if dark_backdrop else _muted(rng, 15, 85)
        thickness = rng.uniform(0.006, 0.010) if length else rng.uniform(0.010, 0.018)
        items.append(Clutter((x, y), end, thickness, rgb))
    return tuple(items)
