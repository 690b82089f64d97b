"""What ``dualstream bench`` can measure, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dualstream.measuring import Clock

from . import growth, headline, memory, micro, peers, stages, startup
from .forced_map import DECODERS
from .machine import describe_model
from .shapes import build_model, shape_named
from .workload import Inputs, make_inputs

Row = dict[str, Any]
PEER_ROUNDS = 7  # at most, of a shape that is no toy: a round of peers is some sixteen prompts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Bench:
    """What a run measures, and how.

    Attributes:
        name: of its record.
        shape_name: see ``shapes.SHAPES``.
        model: of that shape; None where no suite needs one.
        image_size: height and width in pixels.
        batches: rows of the batches.
        images: pictures of a row.
        text_tokens: of a row.
        reductions: shares of visual tokens to remove, of the headline and of memory.
        detail: the one at which stages, peers and growth are measured.
        decoders: kinds, see ``forced_map.build_decoder``.
        rounds: of every comparison.
        clock: of the device.
        progress: called after every timed run.
        revision: that ``before_after`` compares with, None for the recorded one.
        shape: facts of the model, see ``machine.describe_model``.
    """

    name: str
    shape_name: str
    model: Any
    image_size: tuple[int, int]
    batches: Sequence[int]
    images: int
    text_tokens: int
    reductions: Sequence[float]
    detail: float
    decoders: Sequence[str]
    rounds: int
    clock: Clock
    progress: Callable[[], Any]
    revision: str | None = None
    shape: dict[str, Any] | None = field(default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """Options that decide what is measured, as plain values."""
        names = ("batches", "images", "text_tokens", "reductions", "detail", "decoders", "rounds", "revision")
        return {"device": self.clock.device.type, **{name: getattr(self, name) for name in names}}

    def inputs(self, batch: int) -> Inputs:
        """Make a batch of the run's kind."""
        return make_inputs(self.model, self.image_size, batch, self.images, self.text_tokens)


def open_bench(args: argparse.Namespace, with_model: bool, progress: Callable[[], Any]) -> Bench:
    """Check the options of a run and build its model.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    name = args.shape or "tiny"
    shape = shape_named(name)
    _check_numbers(args)
    device = _device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = _dtype(args.dtype, shape.is_toy and device.type == "cpu")
    image_size = _image_size(args.image_size) or shape.image_size
    model = None
    if with_model:
        model = build_model(name, args.layers, args.vision_layers, dtype=dtype, device=device)
        make_inputs(model, image_size)  # a picture that does not suit the tower is refused before any suite begins
    return Bench(
        name=args.name or _record_name(args, name, device, dtype, with_model),
        shape_name=name,
        model=model,
        image_size=image_size,
        batches=args.batch,
        images=args.images,
        text_tokens=args.text_tokens,
        reductions=args.reductions,
        detail=args.detail,
        decoders=args.decoders,
        rounds=args.rounds,
        clock=Clock(device),
        progress=progress,
        revision=args.revision,
        shape=None if model is None else describe_model(model, name, image_size),
    )


def _record_name(
    args: argparse.Namespace, shape: str, device: torch.device, dtype: torch.dtype, with_model: bool
) -> str:
    """Name a record after all that makes it another measurement, so that runs do not replace each other's."""
    suites = args.suites or []
    if not with_model:
        return "-".join([*suites, device.type])
    parts = [shape, device.type, str(dtype).removeprefix("torch.")]
    parts += [f"{key}{value}" for key, value in (("l", args.layers), ("v", args.vision_layers)) if value]
    parts += [part for part in (args.image_size, f"{args.images}images" if args.images > 1 else None) if part]
    return "-".join([*parts, *suites])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}; choose cpu") from error
    return device


def _check_numbers(args: argparse.Namespace) -> None:
    for option, values, low in (
        ("--batch", args.batch, 1),
        ("--images", [args.images], 1),
        ("--text-tokens", [args.text_tokens], 1),
        ("--rounds", [args.rounds], 2),
        ("--threads", [args.threads or 1], 1),
    ):
        if min(values) < low:
            raise ValueError(f"{option} {min(values)} must be at least {low}")
    for option, rates in (("--reductions", args.reductions), ("--detail", [args.detail])):
        if not all(0 < rate < 1 for rate in rates):
            raise ValueError(f"{option} {rates} must be shares between 0 and 1, e.g. 0.49")
    unknown = sorted(set(args.decoders) - set(DECODERS))
    if unknown:
        raise ValueError(f"--decoders {', '.join(unknown)} is unknown; choose from {', '.join(DECODERS)}")


def _dtype(name: str, toy_on_cpu: bool) -> torch.dtype:
    if name == "auto":
        return torch.float32 if toy_on_cpu else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--image-size {text!r} must be HEIGHTxWIDTH in pixels, e.g. 448x672")
    return int(parts[0]), int(parts[1])


def _headline(bench: Bench) -> list[Row]:
    rows = []
    for batch in bench.batches:
        inputs = bench.inputs(batch)
        rows += headline.run(
            bench.model, inputs, bench.reductions, bench.decoders, bench.rounds, bench.clock, bench.progress
        )
    return rows


def _stages(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    shape: Any = bench.shape
    counts = {"prefill": "layers", "vision": "vision_layers"}
    depths = {stage: shape[f"full_{name}"] / shape[name] for stage, name in counts.items()}
    for batch in bench.batches:
        rows += stages.run(
            bench.model,
            bench.inputs(batch),
            bench.detail,
            bench.decoders,
            bench.rounds,
            bench.clock,
            progress=bench.progress,
            depths=depths,
        )
    return rows


def _peers(bench: Bench) -> list[Row]:
    shape: Any = bench.shape
    depths = peers.Depths(*(shape[name] for name in ("layers", "full_layers", "vision_layers", "full_vision_layers")))
    rounds = bench.rounds if shape_named(bench.shape_name).is_toy else min(bench.rounds, PEER_ROUNDS)
    rows: list[Row] = []
    for batch in bench.batches:
        inputs, rates = bench.inputs(batch), [bench.detail]
        rows += peers.run(
            bench.model, inputs, rates, rounds, bench.clock, bench.progress, bench.decoders, depths=depths
        )
    return rows


def _overheads(bench: Bench) -> list[Row]:
    from .overheads import suite  # imports most of the package

    return suite.run(bench.rounds, bench.progress, device=bench.clock.device.type)


def _growth(bench: Bench) -> list[Row]:
    """On a CPU a point of real width takes seconds: fewer of them there, and at most four rounds."""
    slow = bench.clock.device.type == "cpu" and not shape_named(bench.shape_name).is_toy
    return growth.run(
        bench.model,
        bench.shape_name,
        bench.image_size,
        bench.detail,
        bench.decoders[0],
        min(bench.rounds, 4) if slow else bench.rounds,
        bench.clock,
        bench.text_tokens,
        quick=slow,
        progress=bench.progress,
    )


def _memory(bench: Bench) -> list[Row]:
    return memory.run(
        bench.shape_name,
        bench.image_size,
        bench.images,
        bench.text_tokens,
        bench.reductions,
        bench.decoders,
        dtype=bench.model.dtype,
        checked=bench.model,
        progress=bench.progress,
    )


def _before_after(bench: Bench) -> list[Row]:
    from . import before_after  # reads an older revision

    return before_after.run(bench.rounds, bench.clock, bench.progress, bench.revision)


MODEL_SUITES: dict[str, Callable[[Bench], list[Row]]] = {
    "headline": _headline,
    "stages": _stages,
    "peers": _peers,
    "growth": _growth,
    "memory": _memory,
}
OTHER_SUITES: dict[str, Callable[[Bench], list[Row]]] = {
    "micro": lambda bench: micro.run(bench.rounds, bench.clock, bench.progress),
    "overheads": _overheads,
    "startup": lambda bench: startup.run(bench.rounds, bench.progress),
    "before_after": _before_after,
}
SUITES = {**MODEL_SUITES, **OTHER_SUITES}


def check_suites(names: Sequence[str]) -> list[str]:
    """Return the names.

    Raises:
        ValueError: one is unknown.
    """
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise ValueError(f"--suites {', '.join(unknown)} is unknown; choose from {', '.join(SUITES)}")
    return list(dict.fromkeys(names))
