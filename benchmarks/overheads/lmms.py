"""Requests of lmms-eval, answered by the plugin's own classes, and the model's bare calls on the same inputs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import Instance

from dualstream.eval.lmms_model.model import DualStreamChat, DualStreamSimple
from dualstream.eval.option_scores import compression_context
from dualstream.eval.scene_questions import Item

TASK, SPLIT = "scenes", "test"
GENERATION = {"max_new_tokens": 8, "do_sample": False}
Ways = dict[str, Callable[[], Any]]


def requests_of(items: Sequence[Item], options: Sequence[str] = ()) -> list[Instance]:
    """Requests as the harness makes them: one to write an answer per item, or one per item and option to score."""
    kind, arguments = ("loglikelihood", _scored) if options else ("generate_until", _written)
    return [
        Instance(
            request_type=kind,
            arguments=(item.question, *arguments(option), number, TASK, SPLIT),
            idx=index,
            metadata={"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number, item in enumerate(items)
        for index, option in enumerate(options or ("",))
    ]


def lmms_jobs(
    name: str, items: Sequence[Item], inputs: Sequence[Any], batch: int, options: Sequence[str], device: str
) -> list[tuple[str, str, Ways]]:
    """Ways to time, with and without compression: (job, its bare way, ways).

    Args:
        name: embedded model, Hub id or folder; loaded as lmms-eval does.
        items: the documents.
        inputs: their questions as prepared batches.
        batch: rows of a batch.
        options: scored in ``loglikelihood``.
        device: where the model goes.
    """
    chat = DualStreamChat(pretrained=name, device=device, batch_size=batch)
    simple = DualStreamSimple.sharing(chat)
    chat.task_dict = simple.task_dict = {TASK: {SPLIT: items}}
    model, processor = chat.runner.model, chat.runner.processor
    jobs = []
    for arm in ("none", "rle"):
        suffix = "" if arm == "none" else f", {arm}"
        written: Ways = {
            f"bare generate{suffix}": partial(_bare, model, processor, inputs, arm, _generate),
            f"generate_until{suffix}": partial(_answered, chat.generate_until, chat, requests_of(items), arm),
        }
        scored: Ways = {
            f"bare forward{suffix}": partial(_bare, model, processor, inputs, arm, _forward),
            f"loglikelihood{suffix}": partial(_answered, simple.loglikelihood, chat, requests_of(items, options), arm),
        }
        jobs += [(f"lmms-eval{suffix}", next(iter(ways)), ways) for ways in (written, scored)]
    return jobs


def _written(_: str) -> tuple[Any, ...]:
    return _messages, dict(GENERATION)


def _scored(option: str) -> tuple[Any, ...]:
    return option, lambda document: [document.image]


def _messages(document: Item) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document.image}, {"type": "text", "text": document.question}]
    return [{"role": "user", "content": content}]


def _answered(answer: Callable[..., Any], chat: DualStreamChat, requests: list[Instance], arm: str) -> list[Any]:
    chat.clear_records()
    chat.use_arm(arm)
    with redirect_stderr(io.StringIO()):  # the bar
        return list(answer(requests))


@torch.no_grad()
def _bare(model: Any, processor: Any, inputs: Sequence[Any], arm: str, call: Callable[..., Any]) -> list[Any]:
    with compression_context(model, processor, arm):
        return [call(model, each) for each in inputs]


def _generate(model: Any, inputs: Any) -> Any:
    return model.generate(**inputs, **GENERATION)


def _forward(model: Any, inputs: Any) -> Any:
    return model(**inputs, logits_to_keep=1, use_cache=True).logits
