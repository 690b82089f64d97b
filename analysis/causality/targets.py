"""Which object of which picture is asked for, and how many pictures every rule removed."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.data_builders.scenes import SHAPES

from .scorers import ClassWords


@dataclass(frozen=True)
class Target:
    """An object to ask for.

    Attributes:
        image: the picture.
        object: the object, the only one of its name there.
        words: what its class is called.
        absent: the name of a class that the picture does not show; None where no class can be named.
        question: a question whose answer is the object's class, for the VQA setting; None where there is none.
        rivals: names of the other classes that could be answered; empty where they are not known.
    """

    image: AnnotatedImage
    object: AnnotatedObject
    words: ClassWords
    absent: str | None = None
    question: str | None = None
    rivals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the object's class."""
        return self.words.name


@dataclass
class Selection:
    """Targets and how they were come by.

    Attributes:
        targets: one per picture that passed.
        funnel: per rule, in order: ``step`` (what it asks for), ``removed`` and ``left`` (numbers of pictures).
    """

    targets: list[Target]
    funnel: list[dict[str, Any]] = field(default_factory=list)

    def require(self, step: str, passed: Sequence[bool]) -> None:
        """Keep the targets that pass one more rule, and count the others.

        Args:
            step: what the rule asks for.
            passed: one per target.
        """
        kept = [target for target, good in zip(self.targets, passed, strict=True) if good]
        self.funnel.append({"step": step, "removed": len(self.targets) - len(kept), "left": len(kept)})
        self.targets = kept


def select_targets(
    images: Sequence[AnnotatedImage],
    *,
    need_question: bool = True,
    questions: Mapping[str, str] | None = None,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    area: tuple[float, float] | None = None,
    seed: int = 0,
) -> Selection:
    """One object per picture that can be asked for by its class alone.

    In scenes the class is the shape, and the object is one whose shape and colour no other object has: then "What
    shape is the red object?" has one answer. Elsewhere it is the only object of its name, no crowd region, and the
    question comes from ``questions``.

    Args:
        images: the pictures.
        need_question: leave out pictures without a question for the VQA setting.
        questions: name of the picture (or its stem, or its number without leading zeros) -> question.
        synonyms: class -> other names.
        area: (least, most) square pixels of the object, mask or else box.
        seed: of the choice among the objects of a picture.

    Returns:
        The selection; its funnel starts with all pictures.
    """
    classes = _classes(images)
    synonyms = synonyms or {}
    alone = f"an object that alone has its name{' and colour' if classes == SHAPES else ''}"
    steps = ["an object", alone, *(["an object of the area asked for"] if area else [])]
    steps += ["a question"] if need_question else []
    removed: Counter[str] = Counter()
    targets = []
    for image in images:
        found = _eligible(image, area)
        missing = next((step for step, objects in zip(steps, found, strict=False) if not objects), None)
        target = None if missing else _target(image, found[-1], classes, questions, synonyms, seed)
        if target is not None and need_question and target.question is None:
            missing = "a question"
        if missing:
            removed[missing] += 1
        elif target is not None:
            targets.append(target)
    selection = Selection(targets, [{"step": "all pictures", "removed": 0, "left": len(images)}])
    for step in steps:
        left = selection.funnel[-1]["left"] - removed[step]
        selection.funnel.append({"step": step, "removed": removed[step], "left": left})
    return selection


def read_questions(path: str | Path) -> dict[str, str]:
    """Read questions per picture: ``{"PICTURE": "QUESTION"}``, or a list of questions, of which the first counts.

    Args:
        path: of a JSON file. The questions that the authors of arXiv 2410.07149 curated have this form; they are not
            part of this package.

    Raises:
        ValueError: the file is no such JSON, or holds no question.
    """
    import json

    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"questions={path.name!r} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"questions={path.name!r} must be an object of picture -> question, got a {type(content)}.")
    found = {}
    for name, value in content.items():
        first = (value[0] if value else "") if isinstance(value, list) else value
        if isinstance(first, str) and first.strip():
            found[str(name)] = first.strip()
    if not found:
        raise ValueError(f"questions={path.name!r} holds no question.")
    return found


def read_synonyms(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read synonyms: one class per line, its names separated by commas, the class first.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"synonyms={path.name!r} cannot be read: {type(error).__name__}.") from None
    names = [[" ".join(name.lower().split()) for name in line.split(",") if name.strip()] for line in lines]
    found = {words[0]: tuple(dict.fromkeys(words[1:])) for words in names if words}
    if not found:
        raise ValueError(f"synonyms={path.name!r} holds no class.")
    return found


def question_for(image: str, questions: Mapping[str, str] | None) -> str | None:
    """The question of a picture, found by its name, its stem, or the number its stem ends with."""
    stem = Path(image).stem
    number = stem.rsplit("_", 1)[-1].lstrip("0")
    return next((questions[key] for key in (image, stem, number) if key in questions), None) if questions else None


def data_label(source: str | Path) -> str:
    """A source of pictures as results name it: files and folders without the folders they are in."""
    return ":".join(Path(part).name or part for part in str(source).split(":"))


def area_of(item: AnnotatedObject) -> float:
    """Square pixels of an object: of its mask where it has one, else of its box."""
    mask = item.mask
    x1, y1, x2, y2 = item.box
    return float(mask.sum()) if mask is not None else (x2 - x1) * (y2 - y1)


def stated_area(item: AnnotatedObject) -> float:
    """Area as the file states it, else that of the mask or box."""
    return area_of(item) if item.area is None else item.area


def _classes(images: Sequence[AnnotatedImage]) -> tuple[str, ...]:
    """All class names of a source; of scenes, all shapes there are."""
    if images and all(image.scene is not None for image in (images[0], images[-1])):
        return SHAPES
    return tuple(sorted({item.name for image in images for item in image.objects}))


def _eligible(image: AnnotatedImage, area: tuple[float, float] | None) -> list[list[AnnotatedObject]]:
    """Objects left after each rule: all but crowds; alone of its name (and, in scenes, colour); of the area."""
    names = Counter(item.name for item in image.objects)
    colors = Counter(item.attributes[:1] for item in image.objects) if image.scene else Counter()
    first = [item for item in image.objects if not item.is_crowd]
    alone = [item for item in first if names[item.name] == 1 and (not image.scene or colors[item.attributes[:1]] == 1)]
    sized = [item for item in alone if area and area[0] < area_of(item) < area[1]]
    return [first, alone, *([sized] if area else [])]


def _target(
    image: AnnotatedImage,
    objects: Sequence[AnnotatedObject],
    classes: Sequence[str],
    questions: Mapping[str, str] | None,
    synonyms: Mapping[str, Sequence[str]],
    seed: int,
) -> Target:
    rng = np.random.default_rng([seed, zlib.crc32(image.name.encode())])
    item = objects[int(rng.integers(len(objects)))]
    present = {other.name for other in image.objects}
    absent = [name for name in classes if name not in present]
    return Target(
        image,
        item,
        ClassWords(item.name, tuple(synonyms.get(item.name, ()))),
        absent[int(rng.integers(len(absent)))] if absent else None,
        f"What shape is the {item.attributes[0]} object?" if image.scene else question_for(image.name, questions),
        tuple(shape for shape in SHAPES if shape != item.name) if image.scene else (),
    )
