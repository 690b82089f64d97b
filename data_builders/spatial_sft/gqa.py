"""Spatial questions of GQA, without any picture of its test sets.

Layout, as the three archives of the dataset unpack (``questions/`` and ``sceneGraphs/`` may also lie flat)::

    GQA/
      questions/train_balanced_questions.json   {question id: {imageId, question, answer, annotations, ...}}
      questions/*test*.json, *val*.json         optional: their pictures are held out
      sceneGraphs/train_sceneGraphs.json        optional: {image id: {objects: {object id: {name, x, y, w, h}}}}
      images/<imageId>.jpg

Which split a picture can go to depends on its id and the seed alone, so that splits share no picture, whatever their
sizes and whichever kind of questions is asked for.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dualstream.data_builders.token_maps.images import image_hash

from .held_out import HeldOut, open_rgb, read_ids
from .rows import conversation
from .spatial_words import is_spatial

QUESTIONS = "train_balanced_questions.json"
SCENE_GRAPHS = "train_sceneGraphs.json"
INSTRUCTION = "Answer the question using a single word or phrase."
SUFFIXES = (".jpg", ".jpeg", ".png")
RESERVED = 0.05  # share of the pictures that each of test and validation draws from


@dataclass(frozen=True)
class GqaQuestion:
    """One question; `objects` are ids into the scene graph of its picture."""

    id: str
    image_id: str
    question: str
    answer: str
    objects: tuple[str, ...]


@dataclass
class Selection:
    """What goes into the set, and what was left out and why.

    Attributes:
        splits: split -> questions in their final order.
        hashes: image id -> SHA-256 of its pixels.
        left_out: reason -> number of questions (``not spatial``, ``repeated``) or pictures (all other reasons).
        digests: the hashes as a set.
    """

    splits: dict[str, list[GqaQuestion]]
    hashes: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    digests: set[str] = field(default_factory=set, repr=False)


class GqaFolder:
    """A folder in the layout of this module.

    Raises:
        ValueError: the folder, its training questions or its pictures are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        found = self._file("questions", QUESTIONS)
        if found is None or not self.images.is_dir():
            raise ValueError(
                f"{folder} is no GQA folder: it needs questions/{QUESTIONS} and images/<imageId>.jpg "
                f"({'the questions are' if found is None else 'images/ is'} missing)."
            )
        self.questions_file = found

    def questions(self) -> list[GqaQuestion]:
        """All training questions in file order.

        Raises:
            ValueError: an entry has no imageId, question or answer.
        """
        content = json.loads(self.questions_file.read_text(encoding="utf-8"))
        rows = []
        for name, entry in content.items():
            missing = [key for key in ("imageId", "question", "answer") if not entry.get(key)]
            if missing:
                raise ValueError(f"question {name} in {self.questions_file} has no {', '.join(missing)}.")
            named = (entry.get("annotations") or {}).get("question") or {}
            objects = tuple(dict.fromkeys(str(value) for value in named.values()))
            rows.append(GqaQuestion(name, str(entry["imageId"]), entry["question"], entry["answer"], objects))
        return rows

    def scene_graphs(self) -> dict[str, Any]:
        """The scene graphs of the training pictures, empty without the file."""
        found = self._file("sceneGraphs", SCENE_GRAPHS)
        return {} if found is None else json.loads(found.read_text(encoding="utf-8"))

    def test_ids(self) -> set[str]:
        """Image ids of every question file of the folder that is not of the training set."""
        folders = [folder for folder in (self.folder / "questions", self.folder) if folder.is_dir()]
        files = {path for folder in folders for path in folder.glob("*questions*.json")}
        return {name for path in sorted(files) if not path.name.startswith("train") for name in read_ids(path)}

    def image_path(self, image_id: str) -> Path | None:
        """The file of a picture, None if there is none."""
        return next((path for s in SUFFIXES if (path := self.images / f"{image_id}{s}").is_file()), None)

    def _file(self, subfolder: str, name: str) -> Path | None:
        return next((path for path in (self.folder / subfolder / name, self.folder / name) if path.is_file()), None)


def split_of(image_id: str, seed: int = 0) -> str:
    """The split a picture belongs to: 5 % of them ``test``, 5 % ``validation``, all others ``train``."""
    share = int(hashlib.sha256(f"{seed}-{image_id}".encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < RESERVED else "validation" if share < 2 * RESERVED else "train"


def select(
    folder: GqaFolder,
    held_out: HeldOut,
    sizes: dict[str, int],
    *,
    spatial: bool = True,
    per_image: int = 4,
    seed: int = 0,
) -> Selection:
    """Choose questions: pictures in random order, at most `per_image` questions of each.

    Args:
        folder: the source.
        held_out: pictures to leave out.
        sizes: ``train``, ``validation``, ``test`` -> most questions.
        spatial: the spatial questions, or all others.
        per_image: most questions per picture.
        seed: of the order and the splits.

    Raises:
        ValueError: nothing is left.
    """
    selection = Selection({split: [] for split in sizes})
    by_image = _candidates(folder.questions(), spatial, selection.left_out)
    order = sorted(by_image)
    random.Random(f"gqa-{seed}").shuffle(order)
    room = dict(sizes)
    with tqdm(total=sum(sizes.values()), desc="GQA questions", unit="q", disable=None) as progress:
        for image_id in order:
            if not any(room.values()):
                break
            split = split_of(image_id, seed)
            if room.get(split) and _take_image(folder, held_out, image_id, selection):
                questions = by_image[image_id][: min(per_image, room[split])]
                selection.splits[split] += questions
                room[split] -= len(questions)
                progress.update(len(questions))
    if not any(selection.splits.values()):
        raise ValueError(f"no question of {folder.folder} is left; left out: {dict(selection.left_out)}.")
    return selection


def _candidates(questions: Iterable[GqaQuestion], spatial: bool, left_out: Counter[str]) -> dict[str, list]:
    by_image: dict[str, list[GqaQuestion]] = {}
    seen = set()
    for question in questions:
        key = (question.image_id, " ".join(question.question.lower().split()))
        if is_spatial(question.question, question.answer) is not spatial:
            left_out["not spatial" if spatial else "spatial"] += 1
        elif key in seen:
            left_out["repeated"] += 1
        else:
            seen.add(key)
            by_image.setdefault(question.image_id, []).append(question)
    return by_image


def _take_image(folder: GqaFolder, held_out: HeldOut, image_id: str, selection: Selection) -> bool:
    """Whether a picture may be used; notes its hash, or counts why not."""
    reason, digest = _inspect(folder, held_out, image_id, selection.digests)
    if reason is not None:
        selection.left_out[reason] += 1
        return False
    selection.hashes[image_id] = digest
    selection.digests.add(digest)
    return True


def _inspect(folder: GqaFolder, held_out: HeldOut, image_id: str, known: set[str]) -> tuple[str | None, str]:
    """(why a picture may not be used or None, hash of its pixels)."""
    path = folder.image_path(image_id)
    reason = held_out.reason(image_id) or ("no image file" if path is None else None)
    if reason is not None or path is None:
        return reason, ""
    try:
        image = open_rgb(path)
    except ValueError:
        return "unreadable", ""
    digest = image_hash(image)
    return held_out.reason(image_id, image) or ("same pixels, other id" if digest in known else None), digest


def gqa_rows(
    folder: GqaFolder, questions: list[GqaQuestion], hashes: dict[str, str], graphs: dict[str, Any], instruction: str
) -> Iterator[dict[str, Any]]:
    """The rows of some questions; pictures keep the bytes of their files.

    Args:
        folder: the source.
        questions: as selected.
        hashes: image id -> SHA-256 of its pixels.
        graphs: scene graphs, may lack pictures.
        instruction: appended to every question on a line of its own; empty for none.
    """
    for item in questions:
        path = folder.image_path(item.image_id)
        if path is None:
            raise ValueError(f"the picture {item.image_id} of question {item.id} has vanished from {folder.images}.")
        objects = (graphs.get(item.image_id) or {}).get("objects") or {}
        prompt = f"{item.question}\n{instruction}" if instruction else item.question
        yield {
            "messages": conversation(prompt, item.answer),
            "images": [{"bytes": path.read_bytes(), "path": path.name}],
            "id": item.id,
            "kind": "relation" if is_spatial(item.question, item.answer) else "other",
            "answer": item.answer,
            "question": item.question,
            "image_id": item.image_id,
            "image_hash": hashes[item.image_id],
            "objects": [_object(objects[name]) for name in item.objects if name in objects],
        }


def _object(entry: dict[str, Any]) -> dict[str, Any]:
    left, top, width, height = (int(entry[key]) for key in ("x", "y", "w", "h"))
    return {"name": entry["name"], "box": [left, top, left + width, top + height]}
