"""Attention of the vision tower, block by block, without keeping more than one map at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dualstream.modeling.families import family_of
from dualstream.modeling.vision_depths import TOWERS

NAME = "dualstream_seen_eager"
Look = Callable[[int, torch.Tensor], None]


@contextmanager
def seen_attention(model: nn.Module, look: Look) -> Iterator[None]:
    """Let a function look at the tower's attention inside the block.

    The tower computes plain softmax attention meanwhile, through the registry of attention functions that transformers
    offers for this; its own implementation is back afterwards, also after an exception.

    Args:
        model: a supported model, without a PEFT wrapper.
        look: called as ``look(block, weights)`` for every call of an attention module, blocks counted from 0;
            `weights` is (B, P, P) float32, the mean over heads, rows are queries. Qwen's towers call once per image
            (per window in windowed blocks), the others once per batch.
    """
    blocks = family_of(model).vision_blocks(model)
    number_of = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    configs = {id(m.config): m.config for block in blocks for m in block.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if attention_mask is None else scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32)
        look(number_of[id(module)], weights.mean(1))
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights

    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del ALL_ATTENTION_FUNCTIONS[NAME]


def attention_between_tokens(model: nn.Module, weights: torch.Tensor) -> torch.Tensor:
    """Turn attention between the patches of one image (or tile) into attention between its visual tokens.

    A token's row is the mean over its patches, a column the sum; the class token is left out, so rows may sum to less
    than 1.

    Args:
        model: the model.
        weights: (P, P), from ``seen_attention``.

    Returns:
        (n, n), tokens in raster order.

    Raises:
        ValueError: the tower attends in windows (Qwen2.5-VL), so that no call shows a whole image.
    """
    family = family_of(model)
    tower = TOWERS[family.name](model, {})
    if family.name == "qwen2_5_vl":
        raise ValueError(
            "Qwen2.5-VL attends in windows: most blocks have no attention between all tokens of an image."
        )
    if family.has_mrope:
        parts = family.vision_tower(model).spatial_merge_size ** 2

        def merged(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (-1, parts)).mean(1)
    else:
        parts = round(1 / getattr(model.config, "downsample_ratio", 1.0)) ** 2

        def merged(rows: torch.Tensor) -> torch.Tensor:
            return tower.per_token(rows[None])

    return merged(merged(weights).T.contiguous()).T * parts
