"""Compress the connector output of one batch and remember what was done to it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .families import family_of, flatten_features
from .prompt_plan import PromptPlan, check_placeholders, on_host
from .visual_compression import CompressionConfig, RunLengthPlan, merge_features, run_length_plan
from .visual_decoder import VisualDecoder


@dataclass
class EncodedImages:
    """The encoded images of one batch with their prompts: what a planner decides from.

    Attributes:
        model: the model.
        output: what ``get_image_features`` returned.
        features: (N, d), the connector output, blocks one after the other in raster order.
        grids: (n_blocks, 2) long on the CPU, height and width of every feature block (image or tile).
        image_index: (n_blocks,) long on the CPU, image of every block, counted over the batch.
        inputs: the model inputs: pixels, grids, ``input_ids``, ``attention_mask`` and the like.
        config: compression options.
        decoder: reads the features.
    """

    model: nn.Module
    output: Any
    features: torch.Tensor
    grids: torch.Tensor
    image_index: torch.Tensor
    inputs: dict[str, Any]
    config: CompressionConfig
    decoder: VisualDecoder

    def readings(self) -> torch.Tensor:
        """Return (N, k) long: what the decoder reads in every cell, as many readings as the method needs."""
        weight = family_of(self.model).unembedding(self.model).weight
        return self.decoder.top_k(self.features, self.config.top_k, weight)

    def run_lengths(self, ids: torch.Tensor) -> RunLengthPlan:
        """Return the plan of the run-length rule for readings (N, k) long."""
        tables = {}
        if self.config.needs_token_tables:
            tables = {
                "meaningless": self.decoder.meaningless.to(ids.device),
                "text_class": self.decoder.text_class.to(ids.device),
            }
        return run_length_plan(ids, self.grids, self.config, **tables)


# Decides which cells stay together and which are dropped, in place of the run-length rule.
Planner = Callable[[EncodedImages], RunLengthPlan]


@dataclass
class ImageCompression:
    """What happened to one image.

    Attributes:
        row: row of the batch that holds the image, -1 if unknown.
        visual_tokens: tokens before, N.
        kept_tokens: tokens after, M.
        ids: (N, k) long, readings of every cell; (N, 0) if a planner decided without them.
        grids: (blocks, 2) long, height and width of the image's blocks (one, or one per tile).
        plan: the plan of this image alone.
    """

    row: int
    visual_tokens: int
    kept_tokens: int
    ids: torch.Tensor
    grids: torch.Tensor
    plan: RunLengthPlan

    @property
    def reduction_rate(self) -> float:
        """1 - kept/N."""
        return 1 - self.kept_tokens / max(self.visual_tokens, 1)


@dataclass
class CompressionReport:
    """What happened to all images of one call.

    Attributes:
        config: the options used.
        ids: (N, k) long, readings of every cell of the batch; (N, 0) if a planner decided without them.
        grids: (n_blocks, 2) long on the CPU.
        image_index: (n_blocks,) long on the CPU, image of every block, counted over the batch.
        row_index: (n_blocks,) long on the CPU, batch row of every block.
        plan: the plan of the whole batch.
        prompt_plan: how the prompt was shortened; its ``order`` maps columns of scores, attentions and hidden states
            back to the original prompt.
    """

    config: CompressionConfig
    ids: torch.Tensor
    grids: torch.Tensor
    image_index: torch.Tensor
    row_index: torch.Tensor
    plan: RunLengthPlan
    prompt_plan: PromptPlan | None = None

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the batch before compression."""
        return self.plan.num_cells

    @property
    def kept_tokens(self) -> int:
        """Visual tokens of the batch after compression."""
        return self.plan.num_kept

    @property
    def reduction_rate(self) -> float:
        """1 - kept/N over the batch."""
        return 1 - self.kept_tokens / max(self.visual_tokens, 1)

    @cached_property
    def images(self) -> list[ImageCompression]:
        """One entry per image, in the order of the batch."""
        plan, ids = self.plan.cpu(), self.ids.cpu()
        sizes = self.grids.prod(-1)
        first_cell, first_kept = sizes.cumsum(0) - sizes, plan.kept_per_block.cumsum(0) - plan.kept_per_block
        images = []
        for image in self.image_index.unique().tolist():
            blocks = (self.image_index == image).nonzero().flatten()
            begin, count = int(first_cell[blocks[0]]), int(sizes[blocks].sum())
            kept_begin, kept = int(first_kept[blocks[0]]), int(plan.kept_per_block[blocks].sum())
            cells = slice(begin, begin + count)
            segment = plan.segment[cells]
            local = RunLengthPlan(
                segment=torch.where(segment < 0, segment, segment - kept_begin),
                anchor=plan.anchor[kept_begin : kept_begin + kept] - begin,
                kept_per_block=plan.kept_per_block[blocks],
                run=plan.run[cells] - plan.run[begin],
            )
            row = int(self.row_index[blocks[0]])
            images.append(ImageCompression(row, count, kept, ids[cells], self.grids[blocks], local))
        return images


def compress_image_output(
    model: nn.Module,
    output: Any,
    image_inputs: dict[str, Any],
    prompt: dict[str, Any],
    config: CompressionConfig,
    decoder: VisualDecoder,
    planner: Planner | None = None,
    host: dict[str, torch.Tensor] | None = None,
) -> tuple[Any, CompressionReport]:
    """Read, plan and pool the output of ``get_image_features``.

    Args:
        model: the model.
        output: what ``model.model.get_image_features(..., return_dict=True)`` returned; left untouched.
        image_inputs: what it was given.
        prompt: the other model inputs, with the original ``input_ids`` (B, L) long.
        config: compression options.
        decoder: reads the features.
        planner: decides in place of the run-length rule.
        host: what ``host_inputs`` returned; None calls it.

    Returns:
        An output of the same type with pooled features (and deepstack features pooled alike), and the report.

    Raises:
        ValueError: if images and prompt do not belong together, a table the method needs is absent, or a planner's
            plan does not fit the images.
    """
    family, host = family_of(model), host_inputs(prompt, image_inputs) if host is None else host
    features = flatten_features(output.pooler_output)
    known = {**image_inputs, **host}
    grids = family.feature_blocks(model, known, output.pooler_output)
    rows = _row_of_block(host["input_ids"], family.image_token_id(model.config), grids, len(features))
    image_index = family.image_of_block(model, known, grids, host["input_ids"])
    inputs = {**prompt, **image_inputs}
    images = EncodedImages(model, output, features, grids, image_index, inputs, config, decoder)
    if planner is None:
        ids = images.readings()
        plan = images.run_lengths(ids)
    else:
        ids = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        plan = _checked_plan(planner(images), images)
    report = CompressionReport(config, ids, grids, image_index, rows, plan)
    if plan.is_identity:
        return feature_output(output, lambda value: value), report
    sizes = plan.kept_per_block.tolist()

    def pool(value: Any) -> Any:
        flat = features if value is output.pooler_output else flatten_features(value)
        merged = merge_features(flat, plan, config.pooling)
        return merged[None] if isinstance(value, torch.Tensor) else list(merged.split(sizes))

    return feature_output(output, pool), report


def host_inputs(prompt: dict[str, Any], image_inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copy what the host must know of a batch to the CPU: prompts, masks and sizes of the images.

    Before the images are encoded the device has nothing to do yet, so nothing waits for this.
    """
    given = {**prompt, **image_inputs}
    names = ("input_ids", "attention_mask", "image_grid_thw", "image_sizes")
    return on_host({name: given[name] for name in names if isinstance(given.get(name), torch.Tensor)})


def feature_output(output: Any, change: Any) -> Any:
    """Return an encoder output of the same type with only its features, each changed by `change`."""
    fields = {"pooler_output": change(output.pooler_output)}
    deepstack = getattr(output, "deepstack_features", None)
    if deepstack is not None:
        fields["deepstack_features"] = [change(layer) for layer in deepstack]
    return type(output)(**fields)


def repeat_rows(output: Any, tokens_per_row: list[int], times: int) -> Any:
    """Repeat the features of every prompt row `times` times, rows kept together (A A B B).

    Args:
        output: encoder output of B prompts.
        tokens_per_row: image placeholders of each prompt.
        times: repetitions.
    """

    def repeat(value: Any) -> Any:
        rows = [row for row in flatten_features(value).split(tokens_per_row) for _ in range(times)]
        return torch.cat(rows)[None] if isinstance(value, torch.Tensor) else rows

    return feature_output(output, repeat)


def _row_of_block(input_ids: torch.Tensor, image_token_id: int, grids: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Return (n_blocks,) long: the prompt row whose placeholders the block fills; everything is on the CPU."""
    per_row = (input_ids == image_token_id).sum(-1)
    check_placeholders(int(per_row.sum()), num_cells, image_token_id)
    sizes = grids.prod(-1)
    return torch.searchsorted(per_row.cumsum(0), sizes.cumsum(0) - sizes, right=True)


def _checked_plan(plan: RunLengthPlan, images: EncodedImages) -> RunLengthPlan:
    """Return a planner's plan, if every token of it stands for cells of one block, at one of them, in their order."""
    cells, kept = len(images.features), plan.num_kept
    if plan.segment.shape != (cells,) or plan.run.shape != (cells,):
        raise ValueError(f"the planner's segment {tuple(plan.segment.shape)} and run must cover {cells} cells")
    sizes = images.grids.prod(-1).to(plan.anchor.device)
    block = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    per_block = torch.bincount(block[plan.anchor], minlength=len(sizes))
    if not torch.equal(per_block, plan.kept_per_block.to(per_block.device)) or bool((plan.anchor.diff() <= 0).any()):
        raise ValueError("the planner's anchors must ascend and lie in the blocks that kept_per_block says")
    own = plan.segment[plan.anchor] == torch.arange(kept, device=plan.anchor.device)
    stays = plan.segment >= 0
    same_block = block[plan.anchor[plan.segment[stays]]] == block[stays]
    if not bool(own.all()) or not bool(same_block.all()):
        raise ValueError("the planner's tokens must each stand at one of their own cells and within one block")
    return plan
