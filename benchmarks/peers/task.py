"""What every peer is given, and how a peer that chooses before the language model goes on from its choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from dualstream.modeling.compression_report import feature_output
from dualstream.modeling.families import family_of, flatten_features
from dualstream.modeling.prompt_plan import plan_prompt

from ..forced_map import kept_cells
from ..prefill import Prefill, feature_grids, first_token
from ..workload import Inputs, image_inputs_of

Way = Callable[[], Prefill]


@dataclass(frozen=True)
class Task:
    """A batch of prompts and how many cells of every picture may stay.

    All feature blocks have one size, so that every choice is one batched operation on the device.

    Attributes:
        model: a stock model.
        inputs: of a batch, padded on the left.
        height: rows of cells of a block.
        width: columns of cells of a block.
        blocks: feature blocks (pictures or tiles) of the batch, as many in every row.
        keep: cells of every block that stay.
    """

    model: Any
    inputs: Inputs
    height: int
    width: int
    blocks: int
    keep: int

    @property
    def cells(self) -> int:
        """Visual tokens of a block."""
        return self.height * self.width

    @property
    def rows(self) -> int:
        """Prompts of the batch."""
        return len(self.inputs["input_ids"])

    @property
    def blocks_per_row(self) -> int:
        """Feature blocks of every prompt."""
        return self.blocks // self.rows

    @property
    def placeholder(self) -> int:
        """Token id that stands for a visual token."""
        return family_of(self.model).image_token_id(self.model.config)

    def encoded(self, **options: Any) -> Any:
        """Return what ``get_image_features`` does for the pictures."""
        pictures = image_inputs_of(self.model, self.inputs)
        return self.model.model.get_image_features(**pictures, **options, return_dict=True)

    def blockwise(self, features: Any) -> torch.Tensor:
        """Return features of the connector as (blocks, cells, d)."""
        return flatten_features(features).view(self.blocks, self.cells, -1)

    @cached_property
    def tower_order(self) -> torch.Tensor | None:
        """Cell of every place in the order in which a tower with windows has them; None for raster order."""
        tower = family_of(self.model).vision_tower(self.model)
        if not hasattr(tower, "window_size"):
            return None
        grids = self.inputs["image_grid_thw"]
        sizes = {name: getattr(tower, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        return get_vision_window_index(grids, **sizes)[0].to(grids.device)

    def positions(self) -> torch.Tensor:
        """Return the positions that stock forward uses: (B, L), or (3, B, L) for M-RoPE."""
        ids = self.inputs["input_ids"]
        if not family_of(self.model).has_mrope:
            return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
        return self.model.model.get_rope_index(ids, **{name: self.inputs[name] for name in names})[0]


def task_of(model: Any, inputs: Inputs, reduction: float, grids: torch.Tensor | None = None) -> Task:
    """Describe the work at a reduction rate.

    Args:
        model: a stock model.
        inputs: of a batch.
        reduction: share of visual tokens to remove, see ``forced_map.kept_cells``.
        grids: what ``feature_grids`` returns, if known.

    Raises:
        ValueError: feature blocks differ in size, rows in their number, a prompt ends in padding, or the rate is not
            within 0..1.
    """
    grids = feature_grids(model, inputs) if grids is None else grids
    rows, sizes = len(inputs["input_ids"]), grids.unique(dim=0)
    if len(sizes) != 1:
        raise ValueError(f"grids={sizes.tolist()}: peers are measured on pictures of one size")
    per_row = (inputs["input_ids"] == family_of(model).image_token_id(model.config)).sum(1)
    if len(per_row.unique()) != 1:
        raise ValueError(f"inputs has {per_row.tolist()} visual tokens per row; all rows must have as many")
    if not bool(inputs["attention_mask"][:, -1].all()) or rows < 1:
        raise ValueError("attention_mask must end in ones: prompts are padded on the left")
    height, width = sizes[0].tolist()
    return Task(model, inputs, height, width, len(grids), int(kept_cells(grids, reduction)[0]))


@dataclass
class Shortened(Prefill):
    """A prompt that was shortened somewhere on its way.

    Attributes:
        input_ids: (B, L2) long, the prompt as the last block saw it.
        attention_mask: (B, L2) long.
        position_ids: (B, L2), or (3, B, L2) for M-RoPE; the next token stands one after the greatest of its row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


# What a choice comes to: the encoder output; (blocks, keep) long ascending, cell of every kept token within its block;
# (blocks, cells) long, kept token that every cell counts into, or None to take those cells alone.
Choice = tuple[Any, torch.Tensor, torch.Tensor | None]


def choosing(task: Task, choose: Callable[[], Choice]) -> Way:
    """Way that encodes pictures, chooses, shortens the prompt, and runs it with kept tokens at their own places."""

    @torch.no_grad()
    def way() -> Shortened:
        return prefilled(task, *shortened(task, *choose()))  # what was encoded is free before the prompt runs

    return way


def shortened(task: Task, output: Any, anchor: torch.Tensor, group: torch.Tensor | None) -> tuple[dict[str, Any], Any]:
    """Shorten the prompt to a ``Choice``; return its inputs and the features for it."""
    inputs, begin = task.inputs, torch.arange(task.blocks, device=anchor.device) * task.cells
    chosen = (anchor + begin[:, None]).flatten()

    def change(value: Any) -> Any:
        cells = task.blockwise(value)
        kept = flatten_features(cells)[chosen] if group is None else means(cells, group, task.keep).flatten(0, 1)
        return kept[None] if isinstance(value, torch.Tensor) else list(kept.split(task.keep))

    plan = plan_prompt(
        inputs["input_ids"], inputs["attention_mask"], task.placeholder, chosen, task.blocks * task.cells, "left"
    )
    short: dict[str, Any] = plan.shorten(inputs, pad_token_id=0)
    short["position_ids"] = plan.positions(task.positions(), "original")
    return short, feature_output(output, change)


def prefilled(task: Task, short: dict[str, Any], features: Any) -> Shortened:
    """Run a shortened prompt with its features."""
    found = first_token(task.model, {**short, "mm_encoder_outputs": {"image": features}})
    prompt = {name: short[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return Shortened(found.first_token, found.cache, found.length, **prompt)


def columns_of(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Return (B, count) long ascending: where (B, n) bool is true, which is `count` times in every row."""
    return chosen.to(torch.uint8).sort(dim=-1, stable=True).indices[:, chosen.shape[1] - count :]


def means(cells: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Average the cells of every group.

    Args:
        cells: (blocks, n, d).
        group: (blocks, n) long, 0 to ``count - 1``.
        count: groups of every block.

    Returns:
        (blocks, count, d), summed in float32, in the dtype of `cells`.
    """
    blocks, _, width = cells.shape
    index = group[..., None].expand(-1, -1, width)
    sums = cells.new_zeros(blocks, count, width, dtype=torch.float32).scatter_add_(1, index, cells.float())
    sizes = sums.new_zeros(blocks, count).scatter_add_(1, group, torch.ones_like(group, dtype=sums.dtype))
    return (sums / sizes[..., None]).to(cells.dtype)
