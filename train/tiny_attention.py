"""Attention for training on a CPU, with packed batches: a shared prefix, then blocks of conversations behind it.

A masked attention over such a sequence computes four times more scores than are allowed; this one computes the prefix
against itself and every block against prefix and block. Without masks (vision towers) it is the textbook formula,
whose backward pass in bfloat16 is several times faster on a CPU than the fused kernel's. It is registered with
transformers under its own name and switched on inside :func:`training_attention` only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "dualstream_training"


@dataclass(frozen=True)
class PackedMasks:
    """Allowed keys of a packed batch with prefix length P and n blocks of L positions.

    Attributes:
        prefix: (B, 1, P, P) bool.
        blocks: (B, 1, n·L, P + L) bool, prefix keys first, then the keys of the query's own block.
    """

    prefix: Tensor
    blocks: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """P, n and L."""
        prefix = self.prefix.shape[-1]
        block = self.blocks.shape[-1] - prefix
        return prefix, self.blocks.shape[-2] // block, block


def packed_masks(segment: Tensor, hidden_keys: Tensor, prefix: int, block: int) -> PackedMasks:
    """Masks of a batch: causal, own segment and prefix only, without hidden keys; every position sees itself.

    Args:
        segment: (B, S) int64, 0 for the prefix (the first `prefix` positions), 1, 2, ... for conversations, -1 for
            padding; S - prefix is a multiple of `block`, and no conversation crosses a block.
        hidden_keys: (B, S) bool, keys that nobody else may see.
        prefix: Prefix length P.
        block: Block length L.
    """
    causal = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    seen = causal & ~hidden_keys[:, None, :prefix] | torch.eye(prefix, dtype=torch.bool)
    tail = segment[:, prefix:].unflatten(1, (-1, block))
    inner = (tail[..., :, None] == tail[..., None, :]) & torch.ones(block, block, dtype=torch.bool).tril()
    outer = (tail > 0)[..., None] & ~hidden_keys[:, None, None, :prefix]
    blocks = torch.cat([outer, inner], -1).flatten(1, 2)
    return PackedMasks(seen[:, None], blocks[:, None])


@contextmanager
def training_attention(part: PreTrainedModel) -> Iterator[None]:
    """Let a vision tower or a language model use this attention for the duration of the block."""
    before = part.config._attn_implementation
    part.config._attn_implementation = NAME
    try:
        yield
    finally:
        part.config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packed: PackedMasks | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention interface of transformers: query, key, value (B, heads, S, d) to (B, S, heads, d)."""
    query = query * scaling
    if packed is None:
        return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2), None
    prefix, count, block = packed.sizes
    key_prefix, value_prefix = key[:, :, :prefix], value[:, :, :prefix]
    head = _weights(query[:, :, :prefix] @ key_prefix.mT, packed.prefix) @ value_prefix

    query_tail = query[:, :, prefix:]
    inner_query, inner_key, inner_value = (x[:, :, prefix:].unflatten(2, (count, block)) for x in (query, key, value))
    inner = (inner_query @ inner_key.mT).flatten(2, 3)
    weights = _weights(torch.cat([query_tail @ key_prefix.mT, inner], -1), packed.blocks)
    own = weights[..., prefix:].unflatten(2, (count, block)) @ inner_value
    tail = weights[..., :prefix] @ value_prefix + own.flatten(2, 3)
    return torch.cat([head, tail], 2).transpose(1, 2), None


def _weights(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


AttentionInterface.register(NAME, _attend)
