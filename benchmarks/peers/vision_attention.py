"""Choice by attention at the end of the vision tower, as VisionZip (arXiv 2412.04467) makes it.

The cells with most attention stay; some of the others become contextual tokens, each with the cells whose keys are
most alike to its own. Departures: cells are merged after the connector, not before it, so that the tower runs
unchanged (the connector is well below 1 % of the prefill of a 7B model); a contextual token is the mean of its cells;
kept tokens stay in raster order at their own places. Towers without a class token (Qwen) are scored by the attention
that a cell receives on average from all patches of its picture in the last block that sees whole pictures.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dualstream.modeling.families import attribute_at, family_of
from dualstream.modeling.vision_depths import native_vision_depth

from .attention import eager, rotated, watched
from .choices import best_cells
from .task import Choice, Task, Way, choosing, columns_of

CONTEXTUAL = 10 / 64  # of the kept tokens, as in the paper's 54 dominant and 10 contextual ones


def vision_attention(task: Task, whole_tower_eager: bool = False) -> Way:
    """Choose by attention in the tower.

    Args:
        task: the work.
        whole_tower_eager: as the public code runs it: every block computes its weights explicitly (and a tower with a
            class token returns all of them). Otherwise the tower keeps its fast attention, and the scores alone are
            computed from queries and keys of one block: one row per head with a class token, all rows without.
    """
    score = class_attention if has_class_token(task.model) else received_attention

    def choose() -> Choice:
        output, scores, keys = score(task, whole_tower_eager)
        return output, *dominant_and_contextual(scores, keys, task.keep)

    return choosing(task, choose)


def has_class_token(model: nn.Module) -> bool:
    """Whether the tower has one; those of the Qwen families have none."""
    return not family_of(model).has_mrope


def class_attention(task: Task, whole_tower_eager: bool = False) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Encode the pictures and score cells by the attention of the class token in the block that is read.

    Returns:
        The encoder output; (blocks, cells) scores summed over heads; (blocks, cells, d_head) mean keys of the heads.
    """
    depth = native_vision_depth(task.model)
    attention = scored_attention(task.model)
    normed = hasattr(attention, "q_norm")
    names = ("q_norm", "k_norm") if normed else ("q_proj", "k_proj")
    options = {"output_attentions": True} if whole_tower_eager else {}
    modules = all_attention(task.model) if whole_tower_eager else []
    with watched({name: getattr(attention, name) for name in names}) as seen, eager(modules):
        output = task.encoded(**options)
    heads = attention.num_heads
    keys = seen[names[1]].unflatten(-1, (heads, -1))
    if whole_tower_eager:
        weights = output.attentions[depth - 1][:, :, 0]
    else:
        query = seen[names[0]][:, 0].unflatten(-1, (heads, -1))
        scores = torch.einsum("bhd,bnhd->bhn", query, keys) * attention.scale
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return output, per_cell(task, weights[..., 1:].sum(1)[..., None])[..., 0], per_cell(task, keys[:, 1:].mean(2))


def received_attention(task: Task, whole_tower_eager: bool = False) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Encode the pictures and score cells by the attention they receive on average in the scored block.

    The module gives no weights away, so they are computed beside its own attention, one head after the other; with
    `whole_tower_eager` all other blocks run eagerly.

    Returns:
        As ``class_attention``, scores meaned over heads.
    """
    attention = scored_attention(task.model)
    others = [module for module in all_attention(task.model) if module is not attention]
    with (
        watched({"qkv": attention.qkv, "attention": attention}) as seen,
        eager(others) if whole_tower_eager else nullcontext(),
    ):
        output = task.encoded()
    heads = (attention.num_heads, attention.head_dim)
    cos, sin = (part[:, None] for part in seen["attention_inputs"]["position_embeddings"])
    query, key, _ = seen["qkv"].view(-1, 3, *heads).unbind(1)
    query, key = (rotated(part.float(), cos, sin).to(part.dtype) for part in (query, key))
    query, key = (part.view(task.blocks, -1, *heads) for part in (query, key))
    received = torch.zeros(query.shape[:2], device=query.device)
    for head in range(attention.num_heads):
        scores = query[:, :, head] @ key[:, :, head].mT * attention.scaling
        received += scores.softmax(-1, dtype=torch.float32).mean(1) / attention.num_heads
    return output, per_cell(task, received[..., None])[..., 0], per_cell(task, key.mean(2))


def scored_attention(model: Any) -> Any:
    """Attention module that is read: of the block whose output the connector reads, of whole pictures."""
    full = getattr(model.config.vision_config, "fullatt_block_indexes", None)
    block = max(full) if full else native_vision_depth(model) - 1
    return all_attention(model)[block]


def all_attention(model: nn.Module) -> list[Any]:
    """Attention modules of the tower, one per block."""
    return [attribute_at(block, "self_attn", "attention", "attn") for block in family_of(model).vision_blocks(model)]


def per_cell(task: Task, patches: torch.Tensor) -> torch.Tensor:
    """Mean values (blocks, patches, d) of the tower over the patches of each cell: (blocks, cells, d) in raster order.

    A cell of Qwen towers is made of patches that follow each other, and windows of Qwen2.5-VL change the order of
    cells; a cell of InternVL is a square of patches in raster order.
    """
    count, width = patches.shape[1] // task.cells, patches.shape[-1]
    if not family_of(task.model).has_mrope:
        side = round(count**0.5)
        grid = patches.view(task.blocks, task.height, side, task.width, side, width)
        return grid.mean((2, 4)).view(task.blocks, task.cells, width)
    cells = patches.view(task.blocks * task.cells, count, width).mean(1)
    if task.tower_order is not None:
        cells = torch.empty_like(cells).index_copy_(0, task.tower_order, cells)
    return cells.view(task.blocks, task.cells, width)


def dominant_and_contextual(
    scores: torch.Tensor, keys: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose the cells with the highest scores and let the others join contextual ones by their keys.

    Args:
        scores: (blocks, n).
        keys: (blocks, n, d_head).
        keep: tokens to keep.

    Returns:
        anchor: (blocks, keep) long ascending. group: (blocks, n) long, token that every cell counts into, None if all
        stay.
    """
    blocks, cells = scores.shape
    if keep == cells:
        return torch.arange(cells, device=scores.device).expand(blocks, -1), None
    contextual = max(1, round(keep * CONTEXTUAL))
    dominant = best_cells(scores, keep - contextual)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, dominant, True)
    rest = columns_of(~chosen, cells - dominant.shape[1])
    step = rest.shape[1] // contextual
    targets = rest[:, ::step][:, :contextual]
    unit = nn.functional.normalize(keys, dim=-1)
    wide = unit.shape[-1]
    alike = unit.gather(1, rest[..., None].expand(-1, -1, wide)) @ (
        unit.gather(1, targets[..., None].expand(-1, -1, wide)).mT
    )
    kept = chosen.scatter(1, targets, True)
    token = kept.cumsum(1) - 1
    joined = torch.where(kept.gather(1, rest), rest, targets.gather(1, alike.argmax(-1)))
    group = token.scatter(1, rest, token.gather(1, joined))
    return columns_of(kept, keep), group
