"""Rows in the conversational format of TRL: `messages` and `images`, and what a study needs to know beside them."""

from __future__ import annotations

import io
import random
from typing import Any

from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from dualstream.data_builders.scenes import SPLIT_SEEDS, make_scene, questions, rasterize

from .whats_up import WhatsUpItem, make_set

NON_SPATIAL_KINDS = ("presence", "attribute", "count")
SET_SIZE = 4

_CONVERSATION = {
    "messages": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
    "images": List(Image()),
    "id": Value("string"),
    "kind": Value("string"),
    "answer": Value("string"),
}
BOX = List(Value("int32"), length=4)

#: What's-Up form. Boxes: left, top, right, bottom in pixels, right and bottom exclusive.
WHATS_UP_FEATURES = Features(
    {
        **_CONVERSATION,
        "set_id": Value("string"),
        "pair_id": Value("string"),
        "relation": Value("string"),
        "anchor": Value("string"),
        "subject": Value("string"),
        "reference": Value("string"),
        "subject_box": BOX,
        "reference_box": BOX,
        "order": List(Value("string"), length=4),
        "options": List(Value("string"), length=4),
    }
)
#: Presence, attributes and counts on other scenes: what must not get lost.
NON_SPATIAL_FEATURES = Features({**_CONVERSATION, "form": Value("string")})
#: Questions of GQA; `objects` are those the question names, with boxes as above.
GQA_FEATURES = Features(
    {
        **_CONVERSATION,
        "question": Value("string"),
        "image_id": Value("string"),
        "image_hash": Value("string"),
        "objects": List({"name": Value("string"), "box": BOX}),
    }
)


def conversation(question: str, answer: str) -> list[dict[str, Any]]:
    """One turn: the picture and the question, then the answer."""
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def whats_up_rows(seed: int, size: int = 96, form: str = "word") -> list[dict[str, Any]]:
    """The four rows of a set, see ``whats_up``.

    Args:
        seed: of the set.
        size: side of the pictures in pixels.
        form: ``word`` or ``letter``.
    """
    return [_whats_up_row(seed, item, size, form) for item in make_set(seed)]


def _whats_up_row(seed: int, item: WhatsUpItem, size: int, form: str) -> dict[str, Any]:
    raster = rasterize(item.scene, size)
    question, answer = item.question(form), item.answer(form)
    name = f"{seed}-{item.relation}"
    return {
        "messages": conversation(question, answer),
        "images": [{"bytes": _png(raster.image), "path": f"{name}.png"}],
        "id": name,
        "kind": "relation",
        "answer": answer,
        "set_id": f"{seed}",
        "pair_id": f"{seed}-{item.axis}",
        "relation": item.relation,
        "anchor": item.anchor,
        "subject": item.subject,
        "reference": item.reference,
        "subject_box": raster.boxes[0].tolist(),
        "reference_box": raster.boxes[1].tolist(),
        "order": list(item.order),
        "options": item.options(),
    }


def non_spatial_row(seed: int, size: int = 96) -> dict[str, Any]:
    """A question without a place in it about the scene of a seed, its kind drawn evenly."""
    rng = random.Random(f"non-spatial-{seed}")
    scene = make_scene(seed)
    kinds = rng.sample(NON_SPATIAL_KINDS, len(NON_SPATIAL_KINDS))
    question = questions(scene, rng, tuple(kinds))[0]  # there is always one: any scene admits a count
    return {
        "messages": conversation(question.text, question.answer),
        "images": [{"bytes": _png(rasterize(scene, size).image), "path": f"{seed}.png"}],
        "id": f"{seed}-{question.kind}",
        "kind": question.kind,
        "answer": question.answer,
        "form": question.form,
    }


def split_range(split: str, start: int, stop: int) -> range:
    """The seeds number `start` to `stop` of a split; splits have no seed in common.

    Raises:
        ValueError: the split is unknown or too short.
    """
    if split not in SPLIT_SEEDS:
        raise ValueError(f"split is {split!r}; accepted are {', '.join(SPLIT_SEEDS)}.")
    seeds = SPLIT_SEEDS[split]
    if not 0 <= start <= stop <= len(seeds):
        raise ValueError(f"seeds {start} to {stop} were asked of split {split!r}, which has {len(seeds)}.")
    return seeds[start:stop]


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
