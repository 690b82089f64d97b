"""Dropping visual tokens inside the language model, as FastV (arXiv 2403.06764) and PyramidDrop (2410.17247) do.

The first blocks see the whole prompt; then the visual tokens that the last token of the prompt attends to least are
dropped, and the other blocks go on with what is left at its own positions. Blocks, rotary embedding and masks are the
stock model's; keys and values of the first blocks keep the whole prompt, so the cache is longer than that of a method
that chooses before the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from scipy.optimize import brentq
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from dualstream.modeling.families import family_of, flatten_features

from .attention import eager, rotated, watched
from .task import Shortened, Task, Way, columns_of

FULL_BLOCKS = 2  # FastV's K
STAGES = 4  # PyramidDrop's: it drops after every quarter of the blocks


def drop_after(task: Task, full_blocks: int = FULL_BLOCKS, eager_scores: bool = False) -> Way:
    """Drop once, after the first blocks, down to the kept number (FastV).

    Args:
        task: the work.
        full_blocks: blocks that see the whole prompt.
        eager_scores: as the public code has it: the last of these blocks computes all its attention weights. Otherwise
            only the row of the last token is computed, from the keys in the cache.

    Raises:
        ValueError: no block would be left.
    """
    blocks = len(family_of(task.model).llm_blocks(task.model))
    if not 1 <= full_blocks < blocks:
        raise ValueError(f"full_blocks={full_blocks} must lie within 1..{blocks - 1}, blocks of the model less one")
    return dropping(task, {full_blocks: task.keep * task.blocks_per_row}, eager_scores)


def pyramid_drop(task: Task) -> Way:
    """Drop a constant share after every quarter of the blocks, so that blocks see the kept number on average.

    Departure: PyramidDrop keeps half at every stage; here the share is what makes the budget equal.

    Raises:
        ValueError: the model has fewer blocks than stages, or keeps less than the first quarter sees already.
    """
    blocks, whole = len(family_of(task.model).llm_blocks(task.model)), task.cells * task.blocks_per_row
    kept = stages_of(blocks, whole, task.keep * task.blocks_per_row)
    return dropping(task, kept, False)


def stages_of(blocks: int, whole: int, keep: int) -> dict[int, int]:
    """Return visual tokens that stay after each number of blocks, so that blocks see `keep` on average.

    Args:
        blocks: of the model.
        whole: visual tokens of a prompt.
        keep: on average over blocks.

    Raises:
        ValueError: there are fewer blocks than stages, or `keep` is not above what the first stage sees.
    """
    borders = [blocks * stage // STAGES for stage in range(STAGES + 1)]
    sizes = [end - begin for begin, end in pairwise(borders)]
    share = keep / whole
    if min(sizes) < 1 or share <= sizes[0] / blocks:
        raise ValueError(f"keep={keep} of {whole} is out of reach: {sizes[0]} of {blocks} blocks see the whole prompt")
    if keep == whole:
        return {}

    def excess(ratio: float) -> float:
        return sum(size * ratio**stage for stage, size in enumerate(sizes)) / blocks - share

    ratio = brentq(excess, 0.0, 1.0)
    return {borders[stage]: max(1, round(whole * ratio**stage)) for stage in range(1, STAGES)}


def dropping(task: Task, kept: Mapping[int, int], eager_scores: bool) -> Way:
    """Drop down to given numbers of visual tokens of every row after given numbers of blocks."""

    @torch.no_grad()
    def way() -> Shortened:
        stream, length = Stream(task, task.encoded()), task.inputs["input_ids"].shape[1]
        for blocks, number in kept.items():
            if number < stream.visual:
                stream.run(blocks - 1)
                stream.drop(stream.run_scoring(eager_scores), number)
        stream.run(len(stream.blocks))
        return Shortened(stream.first_token(), stream.cache, length, stream.ids, stream.mask, stream.positions)

    return way


class Stream:
    """A prompt on its way through the blocks of a stock language model.

    Attributes:
        hidden: (B, L, d).
        depth: blocks executed.
        ids: (B, L) long. mask: (B, L) long. positions: (B, L), or (3, B, L) for M-RoPE.
        visual: visual tokens of every row.
        cache: keys and values, of as many columns as each block saw; None to keep none.
    """

    def __init__(self, task: Task, output: Any, cache: bool = True) -> None:
        model, family = task.model, family_of(task.model)
        self.config: Any = model.config.get_text_config()
        self.blocks: Any = family.llm_blocks(model)
        self.norm, self.head = family.final_norm(model), family.unembedding(model)
        if "sliding_attention" in (getattr(self.config, "layer_types", None) or ()):
            raise ValueError("a language model with sliding attention is not supported")
        self.token, self.depth = task.placeholder, 0
        self.ids, self.mask, self.positions = task.inputs["input_ids"], task.inputs["attention_mask"], task.positions()
        self.visual = task.cells * task.blocks_per_row
        self.cache = DynamicCache(config=self.config) if cache else None
        embedded = model.get_input_embeddings()(self.ids)
        features = flatten_features(output.pooler_output).to(embedded.dtype)
        self.hidden = embedded.masked_scatter((self.ids == self.token)[..., None], features)
        rotary: Any = family.language_model(model).rotary_emb
        self.rotary = tuple(part.expand(len(self.ids), -1, -1) for part in rotary(embedded, self.positions))
        deep = getattr(output, "deepstack_features", None) or []
        self.deepstack = [flatten_features(layer).view(len(self.ids), self.visual, -1) for layer in deep]
        self.attended = self._causal_mask(self.config)

    def run(self, depth: int) -> None:
        """Execute blocks until `depth` have been."""
        while self.depth < depth:
            self._run_block(self.attended)

    def run_scoring(self, eager_scores: bool = False) -> torch.Tensor:
        """Execute one block; return its attention of the last token to every column, (B, L), meaned over heads."""
        if self.cache is None:
            raise ValueError("cache=False: scores are computed from the keys in the cache")
        block, before = self.blocks[self.depth], self.hidden[:, -1:]
        attention = block.self_attn
        with eager([attention]) if eager_scores else nullcontext(), watched({"attention": attention}) as seen:
            self._run_block(self._causal_mask(attention.config) if eager_scores else self.attended)
        if eager_scores:
            return seen["attention"][1].mean(1)[:, -1]
        keys = self.cache.layers[self.depth - 1].keys
        query = attention.q_proj(block.input_layernorm(before)).unflatten(-1, (-1, keys.shape[-1]))
        query = (attention.q_norm(query) if hasattr(attention, "q_norm") else query).transpose(1, 2)
        query = rotated(query, *(part[:, None, -1:] for part in self.rotary))
        scores = query.unflatten(1, (keys.shape[1], -1)).squeeze(3) @ keys.mT * attention.scaling
        scores = scores.masked_fill((self.mask == 0)[:, None, None], -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).mean((1, 2))

    def drop(self, scores: torch.Tensor, keep: int) -> None:
        """Go on with the `keep` visual tokens of every row that have the highest of (B, L) scores, and all text."""
        placeholder = self.ids == self.token
        chosen = scores.masked_fill(~placeholder, -torch.inf).topk(keep, dim=-1).indices.sort(-1).values
        stays = (~placeholder).scatter(1, chosen, True)
        order = columns_of(stays, stays.shape[1] - self.visual + keep)
        number = (placeholder.cumsum(1) - 1).gather(1, chosen)  # of each chosen one among the visual tokens
        self.deepstack = [_rows(layer, number) for layer in self.deepstack]
        self.hidden, self.visual = _rows(self.hidden, order), keep
        self.rotary = tuple(_rows(part, order) for part in self.rotary)
        self.ids, self.mask = self.ids.gather(1, order), self.mask.gather(1, order)
        self.positions = self.positions.gather(-1, order.expand_as(self.positions[..., : order.shape[1]]))
        self.attended = self._causal_mask(self.config)

    def first_token(self) -> torch.Tensor:
        """Return the most likely next token of every row, (B,) long."""
        return self.head(self.norm(self.hidden[:, -1:]))[:, -1].argmax(-1)

    def _run_block(self, attended: Any) -> None:
        self.hidden = self.blocks[self.depth](
            self.hidden,
            attention_mask=attended,
            position_embeddings=self.rotary,
            position_ids=None,  # gaps in positions would be read as borders of packed sequences
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        )
        if self.depth < len(self.deepstack):
            added = self.hidden.new_zeros(self.hidden.shape)
            placeholder = (self.ids == self.token)[..., None]
            self.hidden = self.hidden + added.masked_scatter(placeholder, self.deepstack[self.depth])
        self.depth += 1

    def _causal_mask(self, config: Any) -> Any:
        return create_causal_mask(
            config=config, inputs_embeds=self.hidden, attention_mask=self.mask, past_key_values=None
        )


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows (B, m, d) of (B, n, d) by (B, m) indices."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
