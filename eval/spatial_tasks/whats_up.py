"""Items of What's Up A and B, COCO-spatial and GQA-spatial, from the benchmark's own files or from question files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .data_folder import check_count, read_json
from .items import OPPOSITE, Item

AXES = {"left": "x", "right": "x", "on": "y", "under": "y", "front": "y", "behind": "y"}
SET_SIZE = 4
_CONTROLLED = ("whatsup_a", "whatsup_b")
_FILE_RELATIONS = {
    "left_of": "left",
    "right_of": "right",
    "on": "on",
    "under": "under",
    "in-front_of": "front",
    "behind": "behind",
}
_STATED = (
    (r"\bleft of\b", "left"),
    (r"\bright of\b", "right"),
    (r"\bfront of\b", "front"),
    (r"\bon top of\b", "above"),
    (r"\bbehind\b", "behind"),
    (r"\babove\b", "above"),
    (r"\bbelow\b", "below"),
    (r"\bunder\b", "under"),
    (r"\bon\b", "on"),
)
_PHRASES = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
    "above": "above",
    "below": "below",
    "on": "on",
    "under": "under",
}
_QUESTION = re.compile(r"Where (?:is|are) the (.+?)(?: in relation to the (.+?)| in the photo)\s*\?", re.DOTALL)


def read_annotations(task: str, path: Path) -> list[Item]:
    """Items of the benchmark's own annotation file.

    Raises:
        ValueError: the file is cut short, of the wrong length, or a row is not understood.
    """
    rows = read_json(path)
    check_count(task, len(rows), path)
    make = _controlled_row if task in _CONTROLLED else _photo_row
    return [make(task, number, row) for number, row in enumerate(rows)]


def read_prompts(task: str, path: Path) -> list[Item]:
    """Items from a file of questions about the same benchmark, with the descriptions written anew.

    Such a file names the objects and the right relation. It does not name the pictures; those of What's Up have
    names made of the objects, those of COCO and GQA cannot be known.

    Raises:
        ValueError: the file is cut short, of the wrong length, or a row is not understood.
    """
    rows = read_json(path)
    check_count(task, len(rows), path)
    return [_prompt_row(task, number, row) for number, row in enumerate(rows)]


def stated_relation(description: str) -> str:
    """The relation that a description states, e.g. ``left`` for "A mug to the left of a knife".

    Raises:
        ValueError: it states none.
    """
    words = re.findall(r"[a-z]+", description.lower())
    if words and words[-1] in OPPOSITE:  # one object: "... on the left"
        return words[-1]
    for pattern, relation in _STATED:
        if re.search(pattern, description.lower()):
            return relation
    raise ValueError(f"description {description!r} states none of {', '.join(OPPOSITE)}.")


def _controlled_row(task: str, number: int, row: Any) -> Item:
    try:
        name, options = Path(row["image_path"]).name, tuple(row["caption_options"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{task}, row {number}: no {error} in {row!r}.") from None
    subject, middle, reference = _parts(Path(name).stem)
    return _controlled(task, number, name, options, _FILE_RELATIONS[middle], (subject, reference))


def _parts(stem: str) -> tuple[str, str, str]:
    match = re.fullmatch(rf"([^_]+)_({'|'.join(_FILE_RELATIONS)})_([^_]+)", stem)
    if not match:
        raise ValueError(f"picture name {stem!r} is not of the form subject_relation_reference.")
    return match[1], match[2], match[3]


def _controlled(
    task: str, number: int, name: str, options: tuple[str, ...], truth: str, objects: tuple[str, str]
) -> Item:
    relations = tuple(stated_relation(option) for option in options)
    if len(options) != SET_SIZE or relations[0] != truth:
        raise ValueError(f"{task}, row {number}: the first of {options} does not say {truth!r} as {name} does.")
    set_id = f"{task}/{objects[0]}/{objects[1]}"
    return Item(
        id=f"{task}-{number}",
        image=name,
        options=options,
        answer=0,
        relations=relations,
        pair_id=f"{set_id}/{AXES[truth]}",
        set_id=set_id,
        set_size=SET_SIZE,
    )


def _photo_row(task: str, number: int, row: Any) -> Item:
    try:
        image, right, wrong = row
    except (TypeError, ValueError):
        raise ValueError(f"{task}, row {number}: {row!r} is not [image id, right, wrong].") from None
    name = f"{int(image):012d}.jpg" if task.startswith("coco") else f"{image}.jpg"
    return _photo(task, number, name, str(right), str(wrong))


def _photo(task: str, number: int, name: str, right: str, wrong: str) -> Item:
    relations = (stated_relation(right), stated_relation(wrong))
    return Item(id=f"{task}-{number}", image=name, options=(right, wrong), answer=0, relations=relations)


def _prompt_row(task: str, number: int, row: Any) -> Item:
    match = _QUESTION.search(row["question"])
    if not match:
        raise ValueError(f"{task}, row {number}: the question {row['question']!r} names no objects.")
    subject, reference = match[1], match[2]
    truth = row["answer"][0].lower()
    if task not in _CONTROLLED:
        right, wrong = (_describe(subject, reference, relation) for relation in (truth, OPPOSITE[truth]))
        return _photo(task, number, "", right, wrong)
    others = ("left", "right", "on", "under") if task == "whatsup_a" else ("left", "right", "front", "behind")
    relations = (truth, *(relation for relation in others if relation != truth))
    middle = next(name for name, relation in _FILE_RELATIONS.items() if relation == truth)
    name = f"{subject.replace(' ', '-')}_{middle}_{reference.replace(' ', '-')}.jpeg"
    options = tuple(_describe(subject, reference, relation, "") for relation in relations)
    return _controlled(task, number, name, options, truth, (subject, reference))


def _describe(subject: str, reference: str | None, relation: str, head: str = "A photo of ") -> str:
    if reference is not None:
        text = f"{head}{_a(subject)} {_PHRASES[relation]} {_a(reference)}"
        return text[0].upper() + text[1:]
    place = {"front": "in front", "behind": "behind"}.get(relation, f"on the {relation}")
    return f"{head}{_a(subject)} {place}"


def _a(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
