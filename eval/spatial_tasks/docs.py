"""The tasks and their documents: one row for every prompt that a model is given, and from answers back to verdicts.

``paper`` has one row per item: the published prompt, greedy text, the published reading. ``fair`` has one row per item
and order of its options: a plain prompt and the texts whose likelihoods are compared.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import scene_tasks
from .data_folder import DATA_VARIABLE, MissingDataError, data_root, find, stand_in_images
from .items import LETTERS, Item, circular_orders, seeded_order
from .parsing import exact, letter, paper_letter, paper_truth, phrase
from .prompts import (
    check_style,
    fair_choice_prompt,
    fair_statement_question,
    paper_choice_prompt,
    paper_statement_prompt,
)
from .scoring import Verdict
from .vsr import read_statements
from .whats_up import read_annotations, read_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

PROTOCOLS = ("paper", "fair")
STYLE_VARIABLE = "DUALSTREAM_PROMPT_STYLE"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: without the protocol.
        form: ``choice`` (lettered descriptions), ``statement`` (true or false) or ``words`` (short answers).
        sets: whether its items come in pairs and sets.
        scenes: how to draw its items, None for benchmarks with files.
        shuffled: whether the paper protocol shows the options in a random order; COCO-spatial has the right one first.
    """

    name: str
    form: str
    sets: bool = False
    scenes: Callable[[int], list[Item]] | None = None
    shuffled: bool = True


def _scenes(kind: str) -> Callable[[int], list[Item]]:
    return lambda count: scene_tasks.scene_items(kind, count)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("whatsup_a", "choice", sets=True),
        Task("whatsup_b", "choice", sets=True),
        Task("coco_spatial_one", "choice", shuffled=False),
        Task("coco_spatial_two", "choice", shuffled=False),
        Task("gqa_spatial_one", "choice"),
        Task("gqa_spatial_two", "choice"),
        Task("vsr_random", "statement"),
        Task("vsr_zeroshot", "statement"),
        *(Task(f"scenes_{kind}", "words", scenes=_scenes(kind)) for kind in scene_tasks.KINDS),
        Task("scenes_whatsup", "words", sets=True, scenes=scene_tasks.whats_up_items),
        Task(
            "scenes_whatsup_letters",
            "choice",
            sets=True,
            scenes=lambda count: scene_tasks.whats_up_items(count, lettered=True),
        ),
    )
}


def load_items(name: str, root: str | Path | None = None) -> tuple[list[Item], Path | None]:
    """The items of a task and the folder of their pictures.

    Args:
        name: of the task, without protocol.
        root: the data folder; by default the one of the environment variable ``DUALSTREAM_DATA``.

    Returns:
        The items; the folder, None for scenes and where stand-ins are drawn.

    Raises:
        MissingDataError: annotations, the picture folder or pictures are missing; the message lists them.
        ValueError: the task is unknown, or a file is incomplete.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; accepted are {', '.join(TASKS)}.")
    draw = TASKS[name].scenes
    if draw is not None:
        return draw(scene_tasks.scene_count()), None
    folder = data_root(root)
    found = find(name, folder)
    if found.known is False:
        logger.warning("%s differs from the file the documented figures were made with.", found.annotations)
    if TASKS[name].form == "statement":
        items = read_statements(name, found.annotations)
    elif found.official:
        items = read_annotations(name, found.annotations)
    else:
        items = read_prompts(name, found.annotations)
        logger.warning("%s: the descriptions are written anew from %s.", name, found.annotations.name)
    if stand_in_images():
        logger.warning("%s: pictures are STAND-INS; every figure of this run is meaningless.", name)
        return items, None
    require_pictures(name, items, found.images)
    return items, found.images


def require_pictures(name: str, items: Sequence[Item], folder: Path | None) -> None:
    """Check that every picture of a task is in the folder.

    Raises:
        MissingDataError: some are not, or the annotations do not name them.
    """
    from .data_folder import SOURCES

    if not all(item.image for item in items):
        wanted = " or ".join(SOURCES[name].annotations)
        raise MissingDataError(f"{name}: the question file does not name the pictures; {wanted} does.")
    if folder is None:
        raise MissingDataError(f"{name}: no picture folder; looked for {', '.join(SOURCES[name].images)}.")
    names = dict.fromkeys(item.image for item in items)
    missing = [image for image in names if not (folder / image).is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise MissingDataError(f"{name}: {len(missing)} of {len(names)} pictures are not in {folder}: {shown}.")


def make_docs(
    name: str, protocol: str, root: str | Path | None = None, style: str = "qwen", limit: int | None = None
) -> list[dict[str, Any]]:
    """The documents of a task under a protocol.

    Args:
        name: of the task.
        protocol: ``paper`` or ``fair``.
        root: the data folder, see ``load_items``.
        style: how the paper protocol asks and reads: ``qwen``, ``llava`` or ``internvl``.
        limit: only the first items.

    Returns:
        Rows with ``item``, ``image``, ``prompt``, ``shown`` (index of the option at each place), ``answer`` (index of
        the right option), ``options``, ``relations``, ``pair_id``, ``set_id``, ``set_size``; for ``paper`` also
        ``style``, ``form`` and ``target`` (the right answer as text); for ``fair`` ``order``, ``orders`` and
        ``choices`` (the texts compared, in the order shown).

    Raises:
        MissingDataError: something is missing.
        ValueError: an argument is not accepted, or a file is incomplete.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; accepted are {', '.join(PROTOCOLS)}.")
    check_style(style)
    items, folder = load_items(name, root)
    task = TASKS[name]
    rows: list[dict[str, Any]] = []
    for item in items[:limit]:
        common = _common(item, _place(task, item, folder))
        if protocol == "paper":
            rows.append(common | paper_row(task, item, style))
        else:
            rows += [common | row for row in fair_rows(task, item)]
    return rows


def _place(task: Task, item: Item, folder: Path | None) -> str:
    if task.scenes is not None:
        return item.image
    return f"stand-in/{item.id}" if folder is None else str(folder / item.image)


def _common(item: Item, image: str) -> dict[str, Any]:
    return {
        "item": item.id,
        "image": image,
        "options": list(item.options),
        "answer": item.answer,
        "relations": list(item.relations),
        "pair_id": item.pair_id,
        "set_id": item.set_id,
        "set_size": item.set_size,
    }


def paper_row(task: Task, item: Item, style: str = "qwen") -> dict[str, Any]:
    """Prompt, order and right answer of an item under the paper protocol."""
    n = len(item.options)
    order = seeded_order(item.id, n) if task.form == "choice" and task.shuffled else tuple(range(n))
    if task.form == "statement":
        prompt, target = paper_statement_prompt(item.question), item.options[item.answer]
    elif task.form == "choice":
        prompt = paper_choice_prompt([item.options[index] for index in order], style)
        target = LETTERS[order.index(item.answer)]
    else:
        prompt, target = item.question, item.options[item.answer]
    return {"prompt": prompt, "shown": list(order), "style": style, "form": task.form, "target": target}


def fair_rows(task: Task, item: Item) -> list[dict[str, Any]]:
    """Prompts and texts to compare of an item in all circular orders of its options.

    A question that names no options has no order and is asked once.
    """
    n = len(item.options)
    worded = task.form == "words"
    orders = circular_orders(n) if item.questions or not worded else [tuple(range(n))]
    rows = []
    for number, order in enumerate(orders):
        shown = [item.options[index] for index in order]
        if worded:
            prompt, choices = (item.questions[number] if item.questions else item.question), shown
        else:
            question = fair_statement_question(item.question) if task.form == "statement" else item.question
            prompt, choices = fair_choice_prompt(shown, question), list(LETTERS[:n])
        rows.append(
            {"prompt": prompt, "shown": list(order), "choices": choices, "order": number, "orders": len(orders)}
        )
    return rows


def judge_text(doc: Mapping[str, Any], text: str) -> Verdict:
    """The verdict on what a model wrote under the paper protocol.

    Returns:
        A verdict whose extra figure ``tolerant`` is the credit under a reading that forgives the usual dress of an
        answer ("A.", "(A)", "Answer: A") and is never part of the published figure.
    """
    place, tolerant = _read(doc, text)
    predicted = None if place is None else doc["shown"][place]
    return Verdict(
        item=doc["item"],
        credit=float(predicted == doc["answer"]),
        options=len(doc["options"]),
        answer=doc["shown"].index(doc["answer"]),
        predicted=predicted,
        relation=doc["relations"][predicted] if predicted is not None and doc["relations"] else "",
        invalid=float(place is None),
        pair_id=doc["pair_id"],
        set_id=doc["set_id"],
        set_size=doc["set_size"],
        extra={"tolerant": float(tolerant is not None and doc["shown"][tolerant] == doc["answer"])},
    )


def _read(doc: Mapping[str, Any], text: str) -> tuple[int | None, int | None]:
    """Place of the answer under the published reading and under a tolerant one."""
    options = [doc["options"][index] for index in doc["shown"]]
    if doc["form"] == "choice":
        return paper_letter(text, len(options), doc["style"]), letter(text, len(options))
    if doc["form"] == "statement":
        truth = paper_truth(text)
        return (None if truth is None else int(not truth)), phrase(text, options)
    return exact(text, options), phrase(text, options)


def open_image(image: str) -> Image:
    """The picture of a document, RGB.

    Raises:
        MissingDataError: the file is gone.
    """
    from PIL import Image

    if image.startswith(("scene/", "set/")):
        return scene_tasks.draw(image)
    if image.startswith("stand-in/"):
        number = zlib.crc32(image.encode())
        return Image.new("RGB", (96, 96), (number & 255, number >> 8 & 255, number >> 16 & 255))
    if not Path(image).is_file():
        raise MissingDataError(f"The picture {image} is gone; the data folder is named by {DATA_VARIABLE}.")
    return Image.open(image).convert("RGB")
