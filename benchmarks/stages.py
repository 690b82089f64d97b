"""Where the time to an answer goes: the stages of one forward pass, marked where modules begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.measuring import MILLISECONDS, Clock, against, interleaved, median_ratio, repeated, timing
from dualstream.modeling import CompressionConfig, VisualDecoder, compressing
from dualstream.modeling.compression_report import EncodedImages
from dualstream.modeling.families import family_of, flatten_features
from dualstream.modeling.prompt_plan import plan_prompt
from dualstream.modeling.visual_compression import merge_features

from .forced_map import build_decoder, forced, kept_cells
from .headline import Row, batch_facts
from .prefill import FULL, LIMIT, OURS, Way, feature_grids, native_short, reading_with, uncompressed
from .workload import Inputs, image_inputs_of

#: In the order in which they happen. ``joining`` is what lies between the pictures and the language model: plan, pool,
#: rewrite, and what every model does there (embed the text, put the features in, find positions).
STAGES = ("preparing", "vision", "connector", "reading", "joining", "prefill", "head")
#: Sums of a pass's stages: as measured, and calculated for a model that has all its blocks.
MEASURED_SUM, FULL_DEPTH_SUM = "first token", "first token, all blocks"
REPEATS = 10  # steps take well under a millisecond: that many are timed at once


class StageClock:
    """Collects how long each stage took, from marks that hooks set; on an accelerator the marks are events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        """Say that a stage begins here."""
        if self.device.type == "cpu":
            self._marks.append((stage, Clock.now()))
            return
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        self._marks.append((stage, event))

    def take(self) -> dict[str, float]:
        """Return seconds per stage since the last call; the last mark ends the last stage."""
        marks, self._marks = self._marks, []
        found = dict.fromkeys(STAGES, 0.0)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        for (stage, begin), (_, end) in pairwise(marks):
            found[stage] += end - begin if self.device.type == "cpu" else begin.elapsed_time(end) / MILLISECONDS
        return found


@contextmanager
def marked_stages(model: nn.Module, decoder: VisualDecoder | None, clock: StageClock) -> Iterator[None]:
    """Mark the stages of forward passes of a model, by hooks that leave with the block."""
    family = family_of(model)
    inside = family.has_mrope  # the connector of these models is a part of the tower
    borders: list[tuple[nn.Module, str, str]] = [
        (family.vision_tower(model), "vision", "joining"),
        (family.connector(model), "connector", "vision" if inside else "joining"),
        (family.language_model(model), "prefill", "head"),
    ]
    if decoder is not None:
        borders.append((decoder, "reading", "joining"))
    handles = []
    try:
        for module, begin, end in borders:
            handles.append(module.register_forward_pre_hook(lambda *_, stage=begin: clock.mark(stage)))
            handles.append(module.register_forward_hook(lambda *_, stage=end: clock.mark(stage)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    model: Any,
    inputs: Inputs,
    reduction: float,
    decoders: Sequence[str],
    rounds: int,
    clock: Clock,
    new_tokens: int = 16,
    progress: Callable[[], Any] | None = None,
    depths: Mapping[str, float] | None = None,
) -> list[Row]:
    """Time every stage of the whole prompt, of the limit and of ours, and the steps that planning is made of.

    Args:
        model: a stock model.
        inputs: of a batch.
        reduction: share of visual tokens to remove.
        decoders: kinds, see ``forced_map.build_decoder``.
        rounds: of every way, interleaved.
        clock: of the device.
        new_tokens: decoding steps that are timed.
        progress: called after every run.
        depths: how many times as many blocks the whole model has, by stage (``vision``, ``prefill``), if it was cut.

    Returns:
        A row per way and stage; ``share`` is its part of the way's time to the first token, ``share_of_prefill`` that
        of the prefill of the whole prompt.
    """
    grids = feature_grids(model, inputs)
    readers = {kind: build_decoder(kind, model) for kind in decoders}
    passes = _passes(model, inputs, reduction, readers, grids, rounds, clock, progress)
    rows = _stage_rows(passes) + _sum_rows(passes, {}, MEASURED_SUM)
    if depths and set(depths.values()) != {1}:
        rows += _sum_rows(passes, depths, FULL_DEPTH_SUM)
    rows += _step_rows(model, inputs, reduction, readers, grids, rounds, clock)
    rows += _decode_rows(model, inputs, reduction, readers, grids, rounds, clock, new_tokens)
    facts = batch_facts(inputs, grids, int(kept_cells(grids, reduction).sum()))
    return [{"suite": "stages", **row, "reduction": reduction, **facts} for row in rows]


def _passes(
    model: Any,
    inputs: Inputs,
    reduction: float,
    readers: dict[str, VisualDecoder],
    grids: torch.Tensor,
    rounds: int,
    clock: Clock,
    progress: Callable[[], Any] | None,
) -> dict[str, list[dict[str, float]]]:
    """Seconds of every stage of every measured round, by way."""
    stage_clock = StageClock(clock.device)
    found: dict[str, list[dict[str, float]]] = {}

    def timed(name: str, way: Way, decoder: VisualDecoder | None) -> Callable[[], None]:
        def run_once() -> None:
            stage_clock.mark("preparing")
            with marked_stages(model, decoder, stage_clock):
                way()
                stage_clock.mark("end")
            found.setdefault(name, []).append(stage_clock.take())

        return run_once

    ways = {
        FULL: timed(FULL, uncompressed(model, inputs), None),
        LIMIT: timed(LIMIT, native_short(model, inputs, reduction, grids), None),
    }
    for kind, decoder in readers.items():
        reader = forced(decoder, grids, reduction)
        ways[f"{OURS}, {kind}"] = timed(f"{OURS}, {kind}", reading_with(model, inputs, reader), reader)
    interleaved(ways, rounds, clock=clock, progress=progress)
    return {name: found[name][-rounds:] for name in ways}


def _stage_rows(passes: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    whole = np.array([stages["prefill"] for stages in passes[FULL]])
    rows = []
    for name, measured in passes.items():
        total = np.array([sum(stages.values()) for stages in measured])
        for stage in STAGES:
            seconds = np.array([stages[stage] for stages in measured])
            if seconds.any():
                rows.append(
                    {
                        "way": name,
                        "stage": stage,
                        **timing(seconds),
                        "share": float(np.median(seconds / total)),
                        "share_of_prefill": median_ratio(seconds, whole),
                    }
                )
    return rows


def _sum_rows(
    passes: Mapping[str, Sequence[Mapping[str, float]]], factors: Mapping[str, float], name: str
) -> list[Row]:
    """Time to the first token of every way, each stage taken as often as it has factors, against the limit."""
    totals = {
        way: np.array([sum(factors.get(stage, 1) * value for stage, value in stages.items()) for stages in measured])
        for way, measured in passes.items()
    }
    return [
        {"way": way, "stage": name, **timing(total), **against(total, totals[LIMIT], LIMIT)}
        for way, total in totals.items()
    ]


def _step_rows(
    model: Any,
    inputs: Inputs,
    reduction: float,
    readers: dict[str, VisualDecoder],
    grids: torch.Tensor,
    rounds: int,
    clock: Clock,
) -> list[Row]:
    """Reading, plan, pooling and rewriting by themselves, on what they are given in a real call."""
    pictures, config = image_inputs_of(model, inputs), CompressionConfig("rle")
    family = family_of(model)
    with torch.no_grad():
        output = model.model.get_image_features(**pictures, return_dict=True)
        features = flatten_features(output.pooler_output)
        order = torch.arange(len(grids))
        encoded = {
            kind: EncodedImages(model, output, features, grids, order, {}, config, forced(decoder, grids, reduction))
            for kind, decoder in readers.items()
        }
        images = next(iter(encoded.values()))
        ids = images.readings()
        plan = images.run_lengths(ids)
        token, mask = family.image_token_id(model.config), inputs["attention_mask"]

        def rewrite() -> Any:
            prompt = plan_prompt(inputs["input_ids"], mask, token, plan.anchor, plan.num_cells, "suffix")
            return prompt.shorten(inputs, 0)

        ways: dict[str, Callable[[], Any]] = {f"reading, {kind}": item.readings for kind, item in encoded.items()}
        ways |= {
            "plan": lambda: images.run_lengths(ids),
            "pool": lambda: merge_features(features, plan, "mean"),
            "rewrite": rewrite,
        }
        at_once = {name: repeated(way, REPEATS) for name, way in ways.items()}
        seconds = interleaved(at_once, max(rounds, 10), clock=clock)
    return [{"way": "by itself", "stage": name, **timing(values / REPEATS)} for name, values in seconds.items()]


def _decode_rows(
    model: Any,
    inputs: Inputs,
    reduction: float,
    readers: dict[str, VisualDecoder],
    grids: torch.Tensor,
    rounds: int,
    clock: Clock,
    new_tokens: int,
) -> list[Row]:
    """Time of one decoding step by ``generate``: what `new_tokens` more tokens cost, divided by their number."""
    kind, decoder = next(iter(readers.items()))
    reader = forced(decoder, grids, reduction)

    def answer(count: int, with_reader: bool) -> Callable[[], Any]:
        def way() -> Any:
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            if not with_reader:
                return model.generate(**inputs, **options)
            with compressing(model, "rle", decoder=reader):
                return model.generate(**inputs, **options)

        return way

    names = {FULL: False, f"{OURS}, {kind}": True}
    ways = {(name, count): answer(count, ours) for name, ours in names.items() for count in (1, 1 + new_tokens)}
    seconds = interleaved({f"{name}|{count}": way for (name, count), way in ways.items()}, rounds, clock=clock)
    rows = []
    steps = {name: (seconds[f"{name}|{1 + new_tokens}"] - seconds[f"{name}|1"]) / new_tokens for name in names}
    for name, values in steps.items():
        rows.append({"way": name, "stage": "decoding step", **timing(values)})
        rows.append({"way": name, "stage": "generate, first token", **timing(seconds[f"{name}|1"])})
    return rows
