"""Ask a model and note what it answers: one row per question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .design import Study
from .items import Item, draw_items

if TYPE_CHECKING:
    from transformers import BatchFeature

SPATIAL, NON_SPATIAL = "spatial", "non-spatial"


@dataclass(frozen=True)
class Batch:
    """Questions as model inputs.

    Attributes:
        inputs: of the model.
        items: the questions, without their pictures.
        options: (B, 4) token ids of the options, in the order of ``Item.options``, -1 where there are fewer.
    """

    inputs: BatchFeature
    items: list[Item]
    options: torch.Tensor


def option_token(tokenizer: Any, word: str) -> int:
    """The token an answer with this word begins with."""
    return tokenizer(word, add_special_tokens=False).input_ids[0]


def prepare(processor: Any, items: Iterable[Item], batch_size: int) -> Iterator[Batch]:
    """Turn questions into batches.

    Raises:
        ValueError: two options of a question begin with the same token, so that one token cannot tell them apart.
    """
    from dualstream.processing import build_inputs

    items = list(items)
    for start in range(0, len(items), batch_size):
        rows = items[start : start + batch_size]
        inputs = build_inputs(processor, [row.image for row in rows], [row.question for row in rows])
        inputs.pop("compression", None)
        options = torch.full((len(rows), 4), -1)
        for index, row in enumerate(rows):
            tokens = [option_token(processor.tokenizer, word) for word in row.options]
            if len(set(tokens)) < len(tokens):
                raise ValueError(f"options {', '.join(row.options)} do not begin with different tokens.")
            options[index, : len(tokens)] = torch.tensor(tokens)
        yield Batch(inputs, [replace(row, image=None) for row in rows], options)  # type: ignore[arg-type]


def set_resolution_for(study: Study, model: Any, processor: Any) -> None:
    """Let the processor take every picture of the study at its own size."""
    from dualstream.train.sft import set_resolution

    areas = [condition.area for condition in study.conditions]
    set_resolution(model, processor, min(areas), max(areas))


def answer(model: Any, tokenizer: Any, batch: Batch) -> list[dict[str, Any]]:
    """Answer a batch by one forward pass: the option whose first token is likeliest, and what would be said freely.

    Returns:
        One row per question: what was asked, ``choice``, ``answer`` (the likeliest token of all), ``valid`` (whether
        that is one of the options), ``correct`` (of the choice), ``nll`` (of the truth among the options).
    """
    inputs = batch.inputs.to(model.device)
    with torch.inference_mode():
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float().cpu()
    scores = logits.gather(1, batch.options.clamp(min=0)).masked_fill(batch.options < 0, -torch.inf).log_softmax(1)
    chosen, free = scores.argmax(1).tolist(), logits.argmax(1).tolist()
    rows = []
    for index, item in enumerate(batch.items):
        truth = item.options.index(item.truth)
        rows.append(
            {
                "part": SPATIAL,
                "condition": item.condition,
                "form": item.form,
                "mirrored": item.mirrored,
                "set_id": item.set_id,
                "kind": item.relation,
                "truth": item.truth,
                "choice": item.options[chosen[index]],
                "answer": tokenizer.decode([free[index]]).strip(),
                "valid": free[index] in batch.options[index].tolist(),
                "correct": chosen[index] == truth,
                "nll": -float(scores[index, truth]),
            }
        )
    return rows


def spatial_batches(processor: Any, study: Study, split: str) -> list[Batch]:
    """The study's questions about places on a split; mirror images only on ``test``."""
    sets = study.validation_sets if split == "validation" else study.test_sets
    asked = [(condition, False) for condition in study.conditions]
    if split == "test":
        asked += [(condition, True) for condition in study.conditions if condition.mirrored]
    batches: list[Batch] = []
    for condition, mirrored in asked:
        items = draw_items(condition, study.forms, sets, split, mirrored)
        batches += prepare(processor, items, study.batch_size)
    return batches


def answer_non_spatial(model: Any, processor: Any, study: Study) -> list[dict[str, Any]]:
    """Answer test questions about presence, attributes and counts, freely."""
    from dualstream.data_builders.scenes import make_scene, render
    from dualstream.data_builders.spatial_sft import non_spatial_row, split_range
    from dualstream.eval.scene_questions import normalize
    from dualstream.processing import answer_questions

    seeds = split_range("test", 0, study.non_spatial)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(seeds), study.batch_size):
        chunk = seeds[start : start + study.batch_size]
        asked = [non_spatial_row(seed) for seed in chunk]
        images = [render(make_scene(seed)) for seed in chunk]
        questions = [row["messages"][0]["content"][1]["text"] for row in asked]
        answers = answer_questions(model, processor, images, questions, max_new_tokens=8)
        for number, (row, given) in enumerate(zip(asked, answers, strict=True)):
            rows.append(
                {
                    "part": NON_SPATIAL,
                    "condition": NON_SPATIAL,
                    "form": "free",
                    "mirrored": False,
                    "set_id": start + number,
                    "kind": row["kind"],
                    "truth": row["answer"],
                    "choice": given.text,
                    "answer": given.text,
                    "valid": True,
                    "correct": normalize(given.text) == normalize(row["answer"]),
                    "nll": float("nan"),
                }
            )
    return rows
