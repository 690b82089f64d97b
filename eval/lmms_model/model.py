"""The classes that lmms-eval calls. Everything that can be done without it is done in the files beside."""

from __future__ import annotations

import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from dualstream.eval.arms import Arm
from dualstream.eval.chat_inputs import Conversation, user_turn
from dualstream.processing import load_image

from .arguments import ModelArguments
from .generation import GenerationSettings, read_generation_settings
from .records import SampleRecords, cost_fields, folder_beside_results
from .runner import ModelRunner

PADDING = "__padding_only__"  # lmms-eval's mark on requests that only keep processes in step


class _DualStream(lmms):
    """What both classes share: loading, arms, records, batches.

    Args:
        **arguments: see ``ModelArguments``.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        given = ModelArguments.read(arguments)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._check_processes(given)
        self.runner = ModelRunner.load(given, self._device(given))
        self.batch_size = given.batch_size
        self._records = SampleRecords(given.records or self._folder(), self._rank)

    @classmethod
    def sharing(cls, other: _DualStream) -> Any:
        """Return a model of this class on the weights, arm and records of another one."""
        model = cls.__new__(cls)
        lmms.__init__(model)
        for name in ("accelerator", "_rank", "_world_size", "runner", "batch_size", "_records"):
            setattr(model, name, getattr(other, name))
        return model

    def _check_processes(self, given: ModelArguments) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self._world_size:
            raise ValueError(
                f"{launched} processes were launched but accelerate sees {self._world_size}: each would answer "
                "everything. On CPU set ACCELERATE_USE_CPU=true before torchrun."
            )
        if launched > 1 and given.is_spread:
            raise ValueError(
                f"--model_args: device_map={given.device_map!r} spreads one model over all devices, but {launched} "
                "processes were launched, which need a device each; leave device_map out or launch one process."
            )

    def _device(self, given: ModelArguments) -> Any:
        own, asked = self.accelerator.device, given.one_device
        if self._world_size == 1:
            return asked or own
        if asked not in (None, own.type):
            raise ValueError(
                f"--model_args: device {asked} does not fit {self._world_size} processes, each of which has {own}; "
                f"leave it out or give {own.type}. On CPU set ACCELERATE_USE_CPU=true."
            )
        return own

    @staticmethod
    def _folder() -> Path | None:
        by_harness = Path(sys.argv[0]).name.startswith("lmms-eval") or "lmms_eval" in Path(sys.argv[0]).parts
        return folder_beside_results(sys.argv[1:]) if by_harness else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.runner.model.device

    @property
    def records(self) -> list[dict[str, Any]]:
        """What every request since the last ``clear_records`` cost."""
        return self._records.rows

    def clear_records(self) -> None:
        """Forget the records in memory; a file keeps them."""
        self._records.clear()

    def use_arm(self, arm: Arm | str | None) -> None:
        """Choose what happens to the visual tokens from now on; None: what the checkpoint does by itself."""
        self.runner.use_arm(arm)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Write an answer to every request.

        Returns:
            Answers in the order of the requests.

        Raises:
            ValueError: a generation setting is unknown, or a document brings video or sound.
        """
        self._records.start()
        repeats = self._repeats(requests)
        groups: dict[str, tuple[GenerationSettings, list[int]]] = {}
        for number, request in enumerate(requests):
            settings = read_generation_settings(self._settings(request))
            groups.setdefault(repr(settings), (settings, []))[1].append(number)
        answers: dict[int, GenerationResult] = {}
        with self._progress(len(requests)) as bar:
            for settings, members in groups.values():
                for batch in self._batches(members, lambda number: len(requests[number].args[0])):
                    conversations, images = self._inputs([requests[number] for number in batch])
                    replies = self.runner.generate(conversations, images, settings)
                    for number, (text, cost) in zip(batch, replies, strict=True):
                        counts = TokenCounts(input_tokens=cost.prompt.total, output_tokens=cost.new_tokens)
                        answers[number] = GenerationResult(text=text, token_counts=counts)
                    self._record(requests, repeats, "generate", zip(batch, [c for _, c in replies], strict=True))
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("the model dualstream answers in one round; choose tasks without several rounds")

    def _inputs(self, requests: Sequence[Instance]) -> tuple[list[Conversation], list[list[Any]]]:
        conversations, images = [], []
        for request in requests:
            conversation, found = self._conversation(request)
            conversations.append(conversation)
            images.append([load_image(image) for image in found])
        return conversations, images

    def _conversation(self, request: Instance) -> tuple[Conversation, list[Any]]:
        raise NotImplementedError

    def _settings(self, request: Instance) -> dict[str, Any]:
        raise NotImplementedError

    def _doc(self, request: Instance) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _repeats(self, requests: list[Instance]) -> list[int]:
        return [self._records.repeat(request.task_name, request.doc_id, request.idx) for request in requests]

    def _batches(self, members: Sequence[int], length: Callable[[int], int]) -> Iterable[list[int]]:
        """Cut into batches of prompts of like length, the longest first: what does not fit fails at once."""
        ordered = sorted(members, key=lambda number: -length(number))
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        """Show a bar, and end this process if one of several fails.

        lmms-eval swallows an exception and ends with status 0; the other processes would wait for this one for hours.

        Raises:
            SystemExit: in place of any exception, if there are several processes.
        """
        try:
            label = f"dualstream {self.runner.arm}"
            with tqdm(total=total, desc=label, unit="request", disable=self.rank != 0) as bar:
                yield bar
        except Exception as error:
            if self.world_size == 1:
                raise
            traceback.print_exc()
            raise SystemExit(f"dualstream: process {self.rank} failed: {error}") from error

    def _record(
        self, requests: list[Instance], repeats: list[int], kind: str, costs: Iterable[tuple[int, Any]]
    ) -> None:
        self._records.add(
            [
                {
                    "task": requests[number].task_name,
                    "doc_id": requests[number].doc_id,
                    "idx": requests[number].idx,
                    "repeat": repeats[number],
                    "rank": self.rank,
                    "request": kind,
                    "arm": str(self.runner.arm),
                    **cost_fields(cost),
                }
                for number, cost in costs
                if not requests[number].metadata.get(PADDING)
            ]
        )


class DualStreamChat(_DualStream):
    """Written answers to chat messages. lmms-eval asks chat models for no likelihoods: see ``DualStreamSimple``."""

    is_simple = False

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Not asked for by lmms-eval."""
        raise NotImplementedError("option likelihoods need lmms-eval --force_simple")

    def _settings(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[2])

    def _conversation(self, request: Instance) -> tuple[Conversation, list[Any]]:
        messages = ChatMessages(messages=request.args[1](self._doc(request)))
        images, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise ValueError(_no_media(request))
        conversation: Conversation = messages.to_hf_messages()
        return [
            {**turn, "content": [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]}
            for turn in conversation
        ], images


class DualStreamSimple(_DualStream):
    """Option likelihoods, and written answers to prompts whose pictures stand before the text."""

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score continuations; all of one document and prompt share one pass over the prompt, and one record.

        Returns:
            In the order of the requests (loss, greedy): the *summed* negative log-likelihood in nats, of which
            lmms-eval picks the smallest, and whether the model's own next words are the continuation.
        """
        self._records.start()
        repeats = self._repeats(requests)
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            padding = bool(request.metadata.get(PADDING))
            groups[request.task_name, request.doc_id, request.args[0], repeats[number], padding].append(number)
        members = list(groups.values())
        losses: dict[int, GenerationResult] = {}
        with self._progress(len(requests)) as bar:
            for batch in self._batches(range(len(members)), lambda group: len(requests[members[group][0]].args[0])):
                numbers = [members[group] for group in batch]
                conversations, images = self._inputs([requests[group[0]] for group in numbers])
                options = [[self._continuation(requests[number]) for number in group] for group in numbers]
                scored = self.runner.score(conversations, images, options)
                for group, (score, _) in zip(numbers, scored, strict=True):
                    for number, value, greedy in zip(group, score.log_likelihoods, score.greedy, strict=True):
                        # The harness turns a plain tuple into a text; inside a result it survives.
                        losses[number] = GenerationResult(text=(-float(value), bool(greedy)))  # type: ignore[arg-type]
                firsts = [(group[0], cost) for group, (_, cost) in zip(numbers, scored, strict=True)]
                self._record(requests, repeats, "loglikelihood", firsts)
                bar.update(sum(map(len, numbers)))
        return [losses[number] for number in range(len(requests))]

    def _continuation(self, request: Instance) -> str:
        given = request.args[1]
        return str(given(self._doc(request)) if callable(given) else given)

    def _settings(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[1])

    def _conversation(self, request: Instance) -> tuple[Conversation, list[Any]]:
        text, visuals = request.args[0], request.args[2]
        images = list(visuals(self._doc(request)) or []) if visuals is not None else []
        if any(isinstance(image, dict) for image in images):
            raise ValueError(_no_media(request))
        return user_turn(text, len(images)), images


def _no_media(request: Instance) -> str:
    return (
        f"document {request.doc_id} of task {request.task_name} brings video or sound; the model dualstream takes "
        "text and pictures only."
    )
