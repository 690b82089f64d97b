"""Measure real attention weights inside any kernel, by giving it values that mark columns.

Attention returns the sum of weight x value. With values that are 1 at chosen columns and 0 elsewhere, the module's own
kernel, fused or not, with its own mask, returns the sum of the weights on those columns: exactly 0 only if each of
them is exactly 0. One channel of the values holds 1 everywhere, so its output is the sum of all weights: 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .attention_masks import Block

OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj")


class KnockoutError(RuntimeError):
    """A knockout did not do what was asked: a weight that should be 0 is not, or a layer could not be checked."""


@torch.no_grad()
def weights_on_sources(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: Sequence[Block], first_query: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Attention of each block's destinations on its sources, as the module's own kernel computes it.

    Args:
        attention: the attention module.
        args: positional arguments it is called with.
        kwargs: keyword arguments it is called with, the mask among them; a cache is copied, not touched.
        blocks: whose weights to measure.
        first_query: column of the first query of this call.

    Returns:
        One (H or heads named, d, s?) summed over sources: (H, d) tensor per block, d the destinations within this
        call; and the sum of all weights (B, Q, H).

    Raises:
        KnockoutError: if the module's value or output projection is not found, or it has too few channels.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    batch, queries = hidden.shape[:2]
    slots = _slots(blocks)
    width = int(attention.head_dim)
    if max(slots, default=0) + 2 > width:
        raise KnockoutError(
            f"{len(blocks)} blocks in one row cannot be checked at once with {width} channels per head"
        )
    captured: list[torch.Tensor] = []
    handles = [
        _value_projection(attention).register_forward_hook(
            lambda module, _, output: _marked(attention, module, output, blocks, slots, first_query)
        ),
        _output_projection(attention).register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0])),
    ]
    kwargs = _with_marked_cache(attention, kwargs, blocks, slots)
    try:
        attention.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    weights = captured[0].view(batch, queries, -1, width)
    found = []
    for block, slot in zip(blocks, slots, strict=True):
        at = block.destinations - first_query
        at = at[(at >= 0) & (at < queries)]
        heads = slice(None) if block.heads is None else list(block.heads)
        found.append(weights[block.row, at.to(weights.device)][:, heads, slot + 1].T)
    return found, weights[..., 0]


def _slots(blocks: Sequence[Block]) -> list[int]:
    """Channel of every block: counted within its row."""
    seen: dict[int, int] = {}
    slots = []
    for block in blocks:
        slots.append(seen.setdefault(block.row, 0))
        seen[block.row] += 1
    return slots


def _marked(
    attention: Any,
    projection: nn.Module,
    output: torch.Tensor,
    blocks: Sequence[Block],
    slots: list[int],
    first_query: int,
) -> torch.Tensor:
    """Projection output whose values mark columns; fused projections hold the values last."""
    heads = _key_heads(attention)
    width = int(attention.head_dim)
    values = output.new_zeros(*output.shape[:2], heads, width)
    _mark(values.transpose(1, 2), blocks, slots, first_query)
    flat = values.flatten(2)
    if flat.shape[-1] == output.shape[-1]:
        return flat
    return torch.cat([output[..., : -flat.shape[-1]], flat], dim=-1)


def _mark(values: torch.Tensor, blocks: Sequence[Block], slots: list[int], first_column: int) -> None:
    """Write marks into values (B, heads, columns, width) in place."""
    values[..., 0] = 1
    for block, slot in zip(blocks, slots, strict=True):
        at = block.sources - first_column
        at = at[(at >= 0) & (at < values.shape[2])].to(values.device)
        values[block.row, :, at, slot + 1] = 1


def _with_marked_cache(
    attention: Any, kwargs: dict[str, Any], blocks: Sequence[Block], slots: list[int]
) -> dict[str, Any]:
    """Arguments with a copy of the cache whose values mark columns, too."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return kwargs
    cache = copy.deepcopy(cache)
    layer = cache.layers[attention.layer_idx]
    if getattr(layer, "values", None) is not None and layer.values.numel():
        values = torch.zeros_like(layer.values)
        _mark(values, blocks, slots, 0)
        layer.values = values
    return {**kwargs, "past_key_values": cache}


def _value_projection(attention: Any) -> nn.Module:
    for name in ("v_proj", "qkv_proj"):
        if isinstance(getattr(attention, name, None), nn.Module):
            return getattr(attention, name)
    raise KnockoutError(
        f"the weights of {type(attention).__name__} cannot be checked: it has neither v_proj nor qkv_proj; "
        "pass verify=False to run without the check"
    )


def _output_projection(attention: Any) -> nn.Module:
    for name in OUTPUT_PROJECTIONS:
        if isinstance(getattr(attention, name, None), nn.Module):
            return getattr(attention, name)
    raise KnockoutError(
        f"the weights of {type(attention).__name__} cannot be checked: it has none of "
        f"{', '.join(OUTPUT_PROJECTIONS)}; pass verify=False to run without the check"
    )


def _key_heads(attention: Any) -> int:
    config: Any = attention.config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
