"""What the time of a peer would be on the whole model, where only a shortened one fits the machine.

A method that drops after the second block pays for two of four blocks on a model cut to four, but for two of 32 on the
whole one. So blocks are timed one by one, and those that the whole model has more of are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.measuring import MILLISECONDS, Clock
from dualstream.modeling.families import family_of

VISION = 0  # the key of blocks of the tower; those of the language model go by the columns they see


@dataclass(frozen=True)
class Depths:
    """Blocks of a model and of the whole one that it was cut from."""

    layers: int
    full_layers: int
    vision_layers: int
    full_vision_layers: int

    @property
    def is_cut(self) -> bool:
        """Whether the whole model has more blocks."""
        return (self.layers, self.vision_layers) != (self.full_layers, self.full_vision_layers)


@dataclass
class Spent:
    """Time of blocks of one kind in one pass."""

    blocks: int = 0
    seconds: float = 0.0


class BlockClock:
    """Times every block of a model, by hooks that leave with ``marked``; on an accelerator, by events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[int, Any, Any]] = []

    @contextmanager
    def marked(self, model: nn.Module) -> Iterator[None]:
        """Time blocks for the length of a ``with`` block."""
        family, begun = family_of(model), []

        def begin(*_: Any) -> None:
            begun.append(self._now())

        def end_of(key: int | None) -> Callable[..., None]:
            def end(_: nn.Module, args: Any, kwargs: dict[str, Any], __: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self._marks.append((hidden.shape[1] if key is None else key, begun.pop(), self._now()))

            return end

        kinds = [(family.vision_blocks(model), VISION), (family.llm_blocks(model), None)]
        with ExitStack() as hooks:
            for blocks, key in kinds:
                for block in blocks:
                    hooks.callback(block.register_forward_pre_hook(begin).remove)
                    hooks.callback(block.register_forward_hook(end_of(key), with_kwargs=True).remove)
            yield

    def take(self) -> dict[int, Spent]:
        """Return what was spent since the last call, by ``VISION`` or columns."""
        marks, self._marks = self._marks, []
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        found: dict[int, Spent] = {}
        for key, begin, end in marks:
            spent = found.setdefault(key, Spent())
            spent.blocks += 1
            spent.seconds += end - begin if self.device.type == "cpu" else begin.elapsed_time(end) / MILLISECONDS
        return found

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return Clock.now()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event


def at_full_depth(
    seconds: np.ndarray, passes: Sequence[Mapping[int, Spent]], depths: Depths, whole_blocks: int | None = None
) -> np.ndarray:
    """Add the blocks that the whole model has more of, each at the mean time of its kind in the same round.

    Args:
        seconds: (rounds,) to the first token.
        passes: of the same rounds, what ``BlockClock.take`` returned.
        depths: of the model.
        whole_blocks: blocks of the whole model that see the most columns, if they do not grow with depth; all others
            then see the fewest.

    Returns:
        (rounds,) seconds.
    """
    return np.array([total + _more(spent, depths, whole_blocks) for total, spent in zip(seconds, passes, strict=True)])


def _more(spent: Mapping[int, Spent], depths: Depths, whole_blocks: int | None) -> float:
    columns = sorted(key for key in spent if key != VISION)
    growth = depths.full_layers / depths.layers
    target = {key: spent[key].blocks * growth for key in columns}
    if whole_blocks is not None and len(columns) > 1:
        rest = sum(spent[key].blocks for key in columns[:-1])
        begun = depths.layers - rest  # 0 where the whole prompt went through a pass of its own
        target = {columns[-1]: float(whole_blocks), columns[0]: depths.full_layers - (whole_blocks if begun else 0.0)}
    if VISION in spent:
        target[VISION] = spent[VISION].blocks * depths.full_vision_layers / depths.vision_layers
    return sum((blocks / spent[key].blocks - 1) * spent[key].seconds for key, blocks in target.items())
