"""Draw a scene: a random one of a seed, or shapes put down one by one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dualstream.data_builders.scenes import COLORS, SHAPES, TEXTURES, Scene, SceneObject, make_scene, questions, render
from dualstream.data_builders.scenes.scene import MAX_OBJECTS, SPLIT_SEEDS, Background

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = 448
RADIUS = 0.12  # half-width of a shape, as in the scenes that the embedded models were trained on
PLAIN = Background("flat", (224, 226, 230), (224, 226, 230), 0.0, 1.0)


@dataclass(frozen=True)
class Suggestion:
    """A question about the scene and its true answer."""

    question: str
    answer: str


def empty_scene() -> Scene:
    """A plain square without a shape."""
    return Scene(0, 1.0, 1.0, (), (), PLAIN)


def random_scene(seed: int, objects: int) -> Scene:
    """A scene that no embedded model was trained on.

    Args:
        seed: any whole number of 0 or more; the same numbers give the same scene.
        objects: 1 to 6.

    Raises:
        ValueError: a number is out of range.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}.")
    held_out = SPLIT_SEEDS["test"]
    return make_scene(held_out[int(seed) % len(held_out)], n_objects=int(objects))


def with_shape(scene: Scene | None, shape: str, color: str, texture: str, x: float, y: float) -> Scene:
    """Put one more shape down.

    Args:
        scene: what is there; None: an empty scene.
        shape: one of ``SHAPES``.
        color: one of ``COLORS``.
        texture: one of ``TEXTURES``.
        x: of its centre, 0 at the left edge and 1 at the right; it is moved inwards where it would be cut.
        y: of its centre, 0 at the top and 1 at the bottom.

    Raises:
        ValueError: a word is unknown, or the scene is full.
    """
    scene = empty_scene() if scene is None else scene
    for name, word, accepted in (("shape", shape, SHAPES), ("color", color, COLORS), ("texture", texture, TEXTURES)):
        if word not in accepted:
            raise ValueError(f"{name}={word!r} is unknown; choose one of {', '.join(accepted)}.")
    if len(scene.objects) >= MAX_OBJECTS:
        raise ValueError(f"a scene holds at most {MAX_OBJECTS} shapes; clear it, or ask about this one.")
    across, down = (
        min(max(float(at) * side, RADIUS), side - RADIUS) for at, side in ((x, scene.width), (y, scene.height))
    )
    return replace(scene, objects=(*scene.objects, SceneObject(shape, color, texture, across, down, RADIUS)))


def picture_of(scene: Scene) -> Image:
    """The scene as pixels."""
    return render(scene, PIXELS)


def suggestions(scene: Scene) -> list[Suggestion]:
    """Questions that the scene answers, none for an empty one; the same for the same scene."""
    if not scene.objects:
        return []
    rng = random.Random(f"{scene.seed}-{len(scene.objects)}")
    asked = questions(scene, rng, ("attribute", "relation", "presence", "count"))
    return [Suggestion(question.text, question.answer) for question in asked]
