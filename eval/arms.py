"""Arms of a benchmark: what happens to the visual tokens, written as one word, e.g. ``rle`` or ``random@rle``.

An arm is ``NAME[@BUDGET][:OPTION=VALUE]...[+ROPE]``:

* ``none``, ``rle``, ``rle_drop_top1``, ``rle_drop_top2`` are the methods of ``CompressionConfig``, whose fields are
  the options; ``paper:rle`` is the published behaviour.
* ``random``, ``stride``, ``neighbours``, ``tome`` keep as many tokens as the budget says: ``@rle`` (any method) as
  many of every picture as that method keeps, ``@0.4`` that share. Options: ``position_policy``, and ``seed`` of
  ``random``.
* ``pool2x2`` (up to 9x9) averages windows. Option: ``position_policy``.
* ``llm_map`` merges by the language model's own reading. Options: ``depth`` and the fields of ``CompressionConfig``.

``+ROPE`` scales the vision tower's rotary frequencies, e.g. ``none+poly:99:8`` or ``rle+sigmoid``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from dualstream.modeling import METHODS, CompressionConfig, Planner, RopeScaling, compressing, rope_scaled

from .baselines import RULES, own_map_planner, planner, pooled_windows

OWN_MAP, PAPER, NONE = "llm_map", "paper", "none"
BASELINE_OPTIONS = ("position_policy",)
ACCEPTED = (
    f"{', '.join(METHODS)}, {PAPER}:METHOD, {', '.join(f'{name}@METHOD or {name}@SHARE' for name in RULES)}, pool2x2, "
    f"{OWN_MAP}; options follow as :NAME=VALUE, a scaling of the vision tower's RoPE as +TYPE:NUMBER..."
)
_SHAPE = re.compile(r"(?P<name>paper:\w+|\w+)(?:@(?P<budget>[\w.]+))?(?P<options>(?::\w+=[\w.-]+)*)")


@dataclass(frozen=True)
class Arm:
    """One way to treat the visual tokens.

    Attributes:
        text: as it was written; names the arm in files and tables.
        config: the compression, or the method that a budget is taken from and where kept tokens stand.
        planner: decides in place of the compression's own rule.
        rope: scaling of the vision tower's rotary frequencies; None: the model's own.
    """

    text: str
    config: CompressionConfig
    planner: Planner | None = None
    rope: RopeScaling | None = None

    def __str__(self) -> str:
        """Return the arm as it was written."""
        return self.text

    @property
    def is_off(self) -> bool:
        """Whether the model is left as it is."""
        return self.config.method == NONE and self.rope is None

    @contextmanager
    def applied(self, model: Any, processor: Any, decoder: Any = None) -> Iterator[Any]:
        """Context in which the model works on what this arm leaves of its images.

        Args:
            model: a supported model.
            processor: its processor, whose tokenizer says which tokens mean nothing.
            decoder: reads the pictures; None: the model's own.

        Raises:
            ValueError: the model has no rotary tower that could be scaled, or the decoder is of another model.
        """
        compression = compressing(
            model, decoder=decoder, tokenizer=processor.tokenizer, config=self.config, planner=self.planner
        )
        with compression, nullcontext() if self.rope is None else rope_scaled(model, self.rope):
            yield model


def parse_arm(text: str) -> Arm:
    """Read an arm.

    Args:
        text: see the module.

    Raises:
        ValueError: naming what is not understood and what is accepted.
    """
    before, plus, rope = text.partition("+")
    found = _SHAPE.fullmatch(before)
    if found is None or bool(plus) != bool(rope):
        raise ValueError(f"arm {text!r} is not understood; accepted are {ACCEPTED}")
    arm = _compression(text, found)
    return dataclasses.replace(arm, rope=RopeScaling.from_any(rope)) if rope else arm


def parse_arms(text: str) -> list[Arm]:
    """Read arms with commas between them, ``none`` first: all others are compared with it.

    Raises:
        ValueError: an arm is not understood or named twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"arms {text!r} must name one arm or more, each once")
    return [parse_arm(name) for name in dict.fromkeys([NONE, *names])]


def _compression(text: str, found: re.Match[str]) -> Arm:
    """The arm without its RoPE."""
    name, budget = found["name"], found["budget"]
    options = dict(option.split("=", 1) for option in found["options"].split(":")[1:])
    if name not in RULES and budget is not None:
        raise ValueError(f"arm {text!r}: {name} takes no budget; only {', '.join(RULES)} do, e.g. random@rle")
    if name in RULES:
        return _budgeted(text, name, budget, options)
    if name == OWN_MAP:
        depth = options.pop("depth", None)
        if depth is not None and not depth.isdecimal():
            raise ValueError(f"arm {text!r}: depth={depth!r} must be a number of language-model blocks")
        config = _config(text, options, "rle", tuple(field.name for field in dataclasses.fields(CompressionConfig)))
        if config.method == NONE:
            raise ValueError(f"arm {text!r}: method must be one of {', '.join(METHODS[1:])}")
        return Arm(text, config, own_map_planner(None if depth is None else int(depth)))
    windows = re.fullmatch(r"pool([2-9])x\1", name)
    if windows:
        rule = pooled_windows(int(windows[1]))
        return Arm(text, _config(text, options, "rle", BASELINE_OPTIONS), planner(rule, None, budget=False))
    return Arm(text, _method(text, name, options))


def _method(text: str, name: str, options: dict[str, str]) -> CompressionConfig:
    method = name.removeprefix(f"{PAPER}:")
    if method not in METHODS or (method == NONE and (options or name != NONE)):
        raise ValueError(f"arm {text!r} is unknown; accepted are {ACCEPTED}")
    accepted = tuple(field.name for field in dataclasses.fields(CompressionConfig) if field.name != "method")
    base = CompressionConfig.paper(method) if name != method else CompressionConfig(method)
    return dataclasses.replace(base, **_values(text, options, accepted))


def _budgeted(text: str, name: str, budget: str | None, options: dict[str, str]) -> Arm:
    by_method = budget is not None and budget in METHODS and budget != NONE
    method, ratio = (str(budget), None) if by_method else ("rle", _share(text, budget))
    config = _config(text, options, method, BASELINE_OPTIONS + ("seed",) * (name == "random"))
    return Arm(text, config, planner(RULES[name], ratio, config.seed))


def _share(text: str, budget: str | None) -> float:
    try:
        share = float(budget or "")
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(
            f"arm {text!r} needs a budget: @METHOD ({', '.join(METHODS[1:])}) or @SHARE, the share of tokens to keep, "
            "above 0 and up to 1"
        )
    return share


def _config(text: str, options: dict[str, str], method: str, accepted: tuple[str, ...]) -> CompressionConfig:
    return CompressionConfig(**{"method": method, **_values(text, options, accepted)})


def _values(text: str, options: dict[str, str], accepted: tuple[str, ...]) -> dict[str, Any]:
    """The options with the types of the fields of ``CompressionConfig``."""
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"arm {text!r} has unknown options {', '.join(unknown)}; accepted are {', '.join(accepted)}")
    values: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(getattr(CompressionConfig, name), bool):
            values[name] = {"true": True, "false": False}.get(value.lower(), value)
        else:
            values[name] = int(value) if value.isdecimal() else value
    return values
