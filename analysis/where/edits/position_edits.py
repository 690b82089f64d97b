"""Take positions away from a model, or mix them up: in the vision tower and in the language model.

Context managers on any supported model, exact for batches, padding and several images per prompt, that leave nothing
behind. Blocks count from 0; a tower or language model whose blocks are not named keeps them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.analysis.interventions import VisualPlace, edited_features, edited_states
from dualstream.modeling.families import attribute_at, family_of

from ..rotary.vision_rotation import rotation_replaced, vision_rotary
from ..vision_states import learned_table

SHUFFLES = ("global", "row", "column", "block")
PLACES = ("zero", "in_place")
BLOCK = 2  # tokens per side of the blocks that ``block`` shuffles within


@contextmanager
def vision_rotation_deleted(
    model: nn.Module, blocks: Collection[int], axes: Collection[str] | None = None
) -> Iterator[None]:
    """Leave queries and keys of some vision blocks unrotated; their contents stay.

    Args:
        model: with a rotary vision tower.
        blocks: of the tower.
        axes: ``h``, ``w``; None: all.

    Raises:
        ValueError: the tower has no rotary positions, or there is no such block or axis.
    """
    rotary = vision_rotary(model)
    _check_blocks(blocks, len(rotary.attentions), "blocks")
    wanted = set(rotary.axes if axes is None else axes)
    if not wanted <= set(rotary.axes):
        raise ValueError(f"axes={sorted(wanted)}; accepted are {', '.join(rotary.axes)}.")
    still = torch.tensor([axis in wanted for axis in rotary.axes])
    frequencies = rotary.frequencies.masked_fill(still.to(rotary.frequencies.device)[:, None], 0.0)
    strength = getattr(rotary.module, "attention_scaling", 1.0)

    def rotate(block: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if block not in blocks:
            return rotary.stock_rotation(block, positions)
        angles = rotary.angles(positions, frequencies)
        return angles.cos() * strength, angles.sin() * strength

    with rotation_replaced(rotary, rotate):
        yield


@contextmanager
def vision_table_deleted(model: nn.Module, blocks: Collection[int], put_back: bool = True) -> Iterator[None]:
    """Take out of the residual stream what the learned position embeddings put into it, for some vision blocks.

    A learned table is added once, before the first block. What it adds there (after CLIP's first norm: the difference
    to the same images without the table) is subtracted from the input of the blocks named, and put back behind them.

    Args:
        model: with a learned table in its tower.
        blocks: of the tower.
        put_back: False leaves it out from the first of these blocks on; with block 0 this is the tower without table.

    Raises:
        ValueError: the tower has no learned table, or there is no such block.
    """
    table, tower = learned_table(model), family_of(model).vision_tower(model)
    if table is None:
        raise ValueError(f"the vision tower of {type(model).__name__} has no learned position embeddings.")
    stack = family_of(model).vision_blocks(model)
    _check_blocks(blocks, len(stack), "blocks")
    share: list[torch.Tensor] = []

    def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        share[:] = [_first_states(tower, stack, args, kwargs)]
        with _emptied(table):
            share[0] = share[0] - _first_states(tower, stack, args, kwargs)

    def out_before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0] - share[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] - share[0]}

    def back_after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] + share[0], *output[1:]) if isinstance(output, tuple) else output + share[0]

    with ExitStack() as hooks:
        hooks.callback(tower.register_forward_pre_hook(measure, with_kwargs=True).remove)
        for block in sorted(blocks) if put_back else [min(blocks)]:
            hooks.callback(stack[block].register_forward_pre_hook(out_before, with_kwargs=True).remove)
            if put_back:  # before hooks that collect the tower's states
                hooks.callback(stack[block].register_forward_hook(back_after, prepend=True).remove)
        yield


@contextmanager
def image_tokens_moved(model: nn.Module, place: str, blocks: Collection[int] | None = None) -> Iterator[None]:
    """Rotate all image tokens to one place in some blocks of the language model; text stays where it is.

    ``zero`` is position 0 (they are not rotated), which also changes how far they are from the text. ``in_place`` is
    where the first token of the same image stands. The order of the causal mask stays.

    Args:
        model: any supported model.
        place: ``zero`` or ``in_place``.
        blocks: of the language model; None: all.

    Raises:
        ValueError: no such place or block.
    """
    if place not in PLACES:
        raise ValueError(f"place is {place!r}; accepted are {', '.join(PLACES)}.")

    def move(part: torch.Tensor, at: VisualPlace, is_cos: bool) -> torch.Tensor:
        if place == "in_place":
            return part[:1].expand_as(part)
        return torch.full_like(part, float(is_cos))

    with _image_rotations(model, blocks, move):
        yield


@contextmanager
def image_positions_shuffled(model: nn.Module, orders: Callable[[VisualPlace], np.ndarray]) -> Iterator[None]:
    """Deal the positions of each image's tokens anew among them, in all blocks of the language model.

    Args:
        model: any supported model.
        orders: the permutation (N,) of an image; token i gets the position of token ``order[i]``.
    """

    def move(part: torch.Tensor, at: VisualPlace, _: bool) -> torch.Tensor:
        return part[torch.as_tensor(orders(at), device=part.device)]

    with _image_rotations(model, None, move):
        yield


@contextmanager
def image_tokens_shuffled(model: nn.Module, orders: Callable[[VisualPlace], np.ndarray]) -> Iterator[None]:
    """Deal the contents of each image's tokens anew among their places, before the language model.

    Args:
        model: any supported model; Qwen3-VL's deepstack features move with their tokens.
        orders: the permutation (N,) of an image; place i gets token ``order[i]``.
    """
    with edited_features(model, lambda states, at: states[torch.as_tensor(orders(at), device=states.device)]):
        yield


def shuffled_order(how: str, grids: Sequence[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    """A random order of the tokens of an image.

    Args:
        how: ``global``: over the whole image; ``row``, ``column``: within each row or column of a grid; ``block``:
            within each 2 x 2 block, which hardly moves anything.
        grids: (rows, columns) of the image's feature blocks, in the order of its tokens.
        rng: seeded by the caller.

    Returns:
        (N,) int64.

    Raises:
        ValueError: there is no such shuffle.
    """
    if how not in SHUFFLES:
        raise ValueError(f"how is {how!r}; accepted are {', '.join(SHUFFLES)}.")
    if how == "global":
        return rng.permutation(sum(rows * columns for rows, columns in grids))
    order, start = [], 0
    for rows, columns in grids:
        row, column = np.divmod(np.arange(rows * columns), columns)
        group = {"row": row, "column": column, "block": (row // BLOCK) * columns + column // BLOCK}[how]
        own = np.lexsort((rng.random(group.size), group))  # group by group, in random order inside
        shuffled = np.empty_like(own)
        shuffled[np.argsort(group, kind="stable")] = own
        order.append(start + shuffled)
        start += rows * columns
    return np.concatenate(order)


@contextmanager
def _image_rotations(
    model: nn.Module, blocks: Collection[int] | None, move: Callable[[torch.Tensor, VisualPlace, bool], torch.Tensor]
) -> Iterator[None]:
    """Change cos and sin (N, channels) of each image's tokens in blocks of the language model."""
    stack = family_of(model).llm_blocks(model)
    chosen = range(len(stack)) if blocks is None else blocks
    _check_blocks(chosen, len(stack), "blocks")
    places: list[VisualPlace] = []

    def note(states: torch.Tensor, at: VisualPlace) -> torch.Tensor:
        places.append(at)
        return states

    def forget(*_: Any) -> None:
        places.clear()

    def turn(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not places:  # a step of decoding, which holds no image
            return args, kwargs
        rows = (args[0] if args else kwargs["hidden_states"]).shape[0]
        cos, sin = (part.expand(rows, *part.shape[1:]).clone() for part in kwargs["position_embeddings"])
        for at in places:
            columns = at.columns.to(cos.device)
            for part, is_cos in ((cos, True), (sin, False)):
                part[at.row, columns] = move(part[at.row, columns], at, is_cos)
        return args, {**kwargs, "position_embeddings": (cos, sin)}

    with ExitStack() as hooks:
        hooks.callback(model.model.register_forward_pre_hook(forget).remove)
        hooks.enter_context(edited_states(model, 0, note))
        for block in chosen:
            attention = attribute_at(stack[block], "self_attn", "attention")
            hooks.callback(attention.register_forward_pre_hook(turn, with_kwargs=True).remove)
        yield


class _Reached(Exception):
    """Ends a pass of the tower before its first block."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _first_states(tower: Any, stack: nn.ModuleList, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What the first block of a tower gets to see."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = stack[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        tower.forward(*args, **kwargs)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise RuntimeError(f"{type(tower).__name__} never reached its first block")


@contextmanager
def _emptied(table: nn.Parameter) -> Iterator[None]:
    stock = table.data
    table.data = torch.zeros_like(stock)
    try:
        yield
    finally:
        table.data = stock


def _check_blocks(blocks: Collection[int], count: int, name: str) -> None:
    if not blocks or not all(0 <= block < count for block in blocks):
        raise ValueError(f"{name}={sorted(blocks)} must name at least one block, each within 0..{count - 1}.")
