"""The rotary attention of a vision tower, block by block: read its queries and keys, or replace its rotation.

The tower computes cos and sin once and hands them, permuted into its own order (Qwen2.5-VL's windows), to every block.
Here the rotary module hands out the positions instead, which take the same way, and each block turns them into its own
cos and sin. So one block can be rotated differently from the next, gradients reach the frequencies, and the order of
the tower need not be known. Where nothing is changed, cos and sin are those of the stock tower, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dualstream.modeling.families import attribute_at, family_of
from dualstream.modeling.rope_modules import MovingRotary
from dualstream.modeling.rope_towers import RotaryTower, stock_frequencies, tower_of, vision_rotaries

Rotation = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Visit = Callable[[int, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]


@dataclass(frozen=True)
class VisionRotary:
    """How a vision tower rotates.

    Attributes:
        module: the rotary module.
        tower: its row in ``ROTARY_TOWERS``.
        attentions: the attention module of every block.
        column: (P,) long, by which column of the positions each rotary pair of channels is rotated.
        entry: (P,) long, with which frequency of that column.
        frequencies: (columns, F) float32, those in use, scaled or not.
    """

    module: nn.Module
    tower: RotaryTower
    attentions: list[nn.Module]
    column: torch.Tensor
    entry: torch.Tensor
    frequencies: torch.Tensor

    @property
    def axes(self) -> tuple[str, ...]:
        """What each column counts: ``h``, ``w``."""
        return self.tower.columns

    def angles(self, positions: torch.Tensor, frequencies: torch.Tensor | None = None) -> torch.Tensor:
        """Angles of every pair of channels, (N, P) float32.

        Args:
            positions: (N, columns).
            frequencies: (columns, F), or (N, columns, F) for every patch its own; None: those in use.
        """
        column, entry = self.column.to(positions.device), self.entry.to(positions.device)
        chosen = (self.frequencies if frequencies is None else frequencies).to(positions.device)[..., column, entry]
        return positions[:, column].float() * chosen

    def stock_rotation(self, _: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin as the tower computes them, (N, P) each."""
        angles = self.angles(positions)
        strength = getattr(self.module, "attention_scaling", 1.0)
        return angles.cos() * strength, angles.sin() * strength


def rotation_problem(model: nn.Module) -> str | None:
    """Why the rotary positions of a model's vision tower cannot be looked at; None where they can."""
    try:
        vision_rotary(model)
    except ValueError as error:
        return str(error).split(";")[0]
    return None


def vision_rotary(model: nn.Module) -> VisionRotary:
    """Find out how a model's vision tower rotates.

    Raises:
        ValueError: the tower has no rotary positions (CLIP, InternViT), or rotates in a way that is not supported.
    """
    rotaries = list(vision_rotaries(family_of(model).vision_tower(model)).values())
    module = rotaries[0]
    tower: Any = tower_of(module)
    if len(rotaries) > 1 or tower.form != "axial" or "t" in tower.columns:
        raise ValueError(f"the rotary positions of the {tower.name} tower cannot be taken apart; axial ones can.")
    columns, count = len(tower.columns), len(stock_frequencies(module))
    if isinstance(module, MovingRotary):
        tables = module.frequency_tables().detach()
        if len(tables) > 1:
            raise ValueError("the RoPE scaling changes with the grid size; give one table for all sizes.")
        frequencies = tables[0]
    else:
        frequencies = module.inv_freq.detach().float()
    # The module itself says where it puts what: send numbered frequencies through it.
    numbers = torch.arange(columns * count, dtype=torch.float64).reshape(1, columns, count)
    layout = module.recomposition_frequencies(numbers)[0].long()
    half = layout[: len(layout) // 2]
    if not torch.equal(half, layout[len(half) :]):
        raise ValueError(f"the {tower.name} tower pairs its channels in another way than j with j + {len(half)}.")
    attentions = [
        attribute_at(block, "attn", "attention", "self_attn") for block in family_of(model).vision_blocks(model)
    ]
    return VisionRotary(
        module, tower, attentions, half // count, half % count, frequencies.broadcast_to(columns, count).clone()
    )


@contextmanager
def rotation_replaced(rotary: VisionRotary, rotate: Rotation) -> Iterator[None]:
    """Let a function compute cos and sin of every block for the length of a ``with`` block.

    Args:
        rotary: of the model.
        rotate: ``rotate(block, positions)`` with positions (N, columns) float32 in the order of the tower; returns
            cos and sin, (N, P) each. Gradients flow through it.
    """
    columns, count = rotary.frequencies.shape

    def hand_out_positions(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        spread = positions[..., None].float().expand(*positions.shape, count).to(output[0].device)
        channels = module.recomposition_frequencies(spread)
        return channels, channels

    pairs = [int((rotary.column == column).nonzero()[0]) for column in range(columns)]

    def hook_of(block: int) -> Callable[..., Any]:
        def turn(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            channels = kwargs["position_embeddings"][0]
            hidden = args[0] if args else kwargs["hidden_states"]
            dtype = hidden.dtype if rotary.tower.casts else torch.float32
            doubled = tuple(torch.cat([part, part], dim=-1).to(dtype) for part in rotate(block, channels[:, pairs]))
            return args, {**kwargs, "position_embeddings": doubled}

        return turn

    with ExitStack() as hooks:
        handle = rotary.module.register_forward_hook(hand_out_positions, with_kwargs=True)
        hooks.callback(handle.remove)
        for block, attention in enumerate(rotary.attentions):
            hooks.callback(attention.register_forward_pre_hook(hook_of(block), with_kwargs=True).remove)
        yield


@contextmanager
def queries_and_keys(rotary: VisionRotary, visit: Visit) -> Iterator[None]:
    """Show every block's queries and keys to a function for the length of a ``with`` block.

    Args:
        rotary: of the model.
        visit: ``visit(block, queries, keys, (cos, sin))``: queries and keys (N, heads, 2P) float32 *before* the
            rotation, cos and sin (N, P) float32 as the block applies them, all in the order of the tower.
    """

    def hook_of(block: int) -> Callable[..., None]:
        def look(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            queries, keys = project(attention, hidden.reshape(-1, hidden.shape[-1]))
            pairs = queries.shape[-1] // 2
            cos, sin = (part.reshape(-1, 2 * pairs)[:, :pairs].float() for part in kwargs["position_embeddings"])
            visit(block, queries.float(), keys.float(), (cos, sin))

        return look

    with ExitStack() as hooks:
        for block, attention in enumerate(rotary.attentions):
            hooks.callback(attention.register_forward_pre_hook(hook_of(block), with_kwargs=True).remove)
        yield


@contextmanager
def tower_positions(rotary: VisionRotary, keep: list[torch.Tensor]) -> Iterator[None]:
    """Append the positions (N, columns) of every pass, in the order of the tower, to a list."""

    def rotate(block: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if block == 0:
            keep.append(positions)
        return rotary.stock_rotation(block, positions)

    with rotation_replaced(rotary, rotate):
        yield


def project(attention: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (N, heads, channels) before the rotation, of states (N, d).

    Raises:
        ValueError: the attention module is of no known form.
    """
    if hasattr(attention, "qkv"):
        queries, keys, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).unbind(1)
        return queries, keys
    if hasattr(attention, "q_proj") and not hasattr(attention, "q_norm"):
        queries, keys = attention.q_proj(hidden), attention.k_proj(hidden)
        return tuple(states.reshape(len(hidden), attention.num_heads, -1) for states in (queries, keys))  # type: ignore[return-value]
    raise ValueError(f"{type(attention).__name__} has neither a fused qkv projection nor plain q_proj and k_proj.")


def image_of_patch(positions: torch.Tensor) -> torch.Tensor:
    """Image of every patch, (N,) long: images stand one after another, each starting with its corner (0, 0)."""
    return (positions == 0).all(-1).cumsum(0) - 1


def raster_places(positions: torch.Tensor) -> list[torch.Tensor]:
    """Where in the tower's order the patches of each image stand, row by row.

    Args:
        positions: (N, 2) rows and columns, in the order of the tower.

    Returns:
        One (rows, columns) long tensor per image.
    """
    places = []
    images = image_of_patch(positions)
    for image in range(int(images.max()) + 1):
        members = (images == image).nonzero()[:, 0]
        rows, columns = positions[members].long().unbind(-1)
        grid = torch.empty(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.long, device=positions.device)
        grid[rows, columns] = members
        places.append(grid)
    return places
