"""Rewrite a batch of prompts so that every image has only the placeholders its compressed features need.

A compressed prompt is an ordinary prompt, so nothing inside the language model has to know about it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LAYOUTS = ("left", "suffix")
IGNORED_LABEL = -100


@dataclass
class PromptPlan:
    """Which original column stands at each column of the shortened prompt.

    Attributes:
        order: (B, L2) long, original column of each new column (arbitrary where `kept` is false).
        kept: (B, L2) bool, false for the padding that fills short rows on the left.
        attention_mask: (B, L2) long, the new 2-D mask.
        original_length: L, columns before.
    """

    order: torch.Tensor
    kept: torch.Tensor
    attention_mask: torch.Tensor
    original_length: int

    @property
    def length(self) -> int:
        """Columns after, L2."""
        return self.order.shape[1]

    @property
    def removed(self) -> int:
        """Columns saved, L - L2."""
        return self.original_length - self.length

    def gather(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """Bring a tensor (..., B, L) that runs along the prompt to (..., B, L2), `fill` in the new padding."""
        order = self.order.expand(*values.shape[:-2], *self.order.shape)
        return values.gather(-1, order).masked_fill(~self.kept, fill)

    def positions(self, position_ids: torch.Tensor, policy: str) -> torch.Tensor:
        """Bring position ids to the shortened prompt.

        Args:
            position_ids: (B, L), (3, B, L) time/height/width, or (4, B, L) with the text index in row 0.
            policy: ``original`` or ``compact``, see ``CompressionConfig``.

        Returns:
            Positions with the leading shape of `position_ids` and length L2. Row 0 of four is always the plain index:
            transformers reads gaps in it as borders between packed sequences.
        """
        index = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        if policy == "compact":
            return index.expand(*position_ids.shape[:-2], *index.shape).contiguous()
        positions = self.gather(position_ids, 0)
        if position_ids.ndim == 3 and position_ids.shape[0] == 4:
            positions[0] = index.masked_fill(self.attention_mask == 0, 0)
        return positions

    def shorten(self, inputs: Mapping[str, Any], pad_token_id: int) -> dict[str, torch.Tensor]:
        """Bring the model inputs that run along the prompt, (B, L) each, to the shortened prompt.

        Args:
            inputs: model inputs; ``input_ids``, ``labels``, ``mm_token_type_ids`` and ``token_type_ids`` are used.
            pad_token_id: fills new padding of ``input_ids``.

        Returns:
            The shortened inputs, with their ``attention_mask``.
        """
        fills = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "mm_token_type_ids": 0, "token_type_ids": 0}
        shortened = {
            name: self.gather(inputs[name], fill) for name, fill in fills.items() if inputs.get(name) is not None
        }
        if "labels" in shortened:
            # A row's first token has nothing before it to predict it from; new padding there must not count.
            first = self.kept & (self.kept.cumsum(-1) == 1)
            shortened["labels"] = shortened["labels"].masked_fill(first, IGNORED_LABEL)
        return {**shortened, "attention_mask": self.attention_mask}

    def rope_deltas(self, position_ids: torch.Tensor, policy: str) -> torch.Tensor:
        """Return (B, 1) long: next position minus number of tokens, from which M-RoPE models continue by themselves.

        Args:
            position_ids: (3 or 4, B, L) original positions.
            policy: ``original`` or ``compact``, see ``CompressionConfig``.
        """
        tokens = self.attention_mask.sum(-1)
        following = tokens if policy == "compact" else position_ids[-3:].amax(dim=(0, 2)) + 1
        return (following - tokens)[:, None]


def plan_prompt(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_token_id: int,
    anchor: torch.Tensor,
    num_cells: int,
    layout: str,
    length: int | None = None,
) -> PromptPlan:
    """Plan the shortened prompts of one batch.

    The k-th image placeholder of the batch, row by row, belongs to the k-th feature: transformers fills them in that
    order.

    Args:
        input_ids: (B, L) long.
        attention_mask: (B, L), nonzero for real tokens, padding on either side.
        image_token_id: id of the image placeholder.
        anchor: (M,) long ascending, features that stay, as in ``RunLengthPlan``.
        num_cells: features before compression, N.
        layout: ``left`` packs every row against the right edge, so all padding is on the left (for generation);
            ``suffix`` drops image placeholders and left padding only and keeps everything else aligned with the right
            edge, so the last columns of labels and logits keep their meaning (for training and scoring).
        length: L2, if the caller has checked the number of placeholders and knows it (see ``shortened_length``); None
            asks the device for both, for which the host waits.

    Returns:
        The plan. If no feature is removed the prompt keeps its length.

    Raises:
        ValueError: if the number of placeholders is not `num_cells`, or the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    placeholder = input_ids == image_token_id
    if length is None:
        check_placeholders(int(placeholder.sum()), num_cells, image_token_id)
    attended = attention_mask != 0
    chosen = torch.zeros(num_cells, dtype=torch.bool, device=input_ids.device)
    chosen[anchor.to(input_ids.device)] = True
    stays = attended if layout == "left" else attended.cumsum(-1) > 0
    stays = stays.masked_scatter(placeholder, chosen)
    nothing_removed = len(anchor) == num_cells
    if nothing_removed and layout == "suffix":
        stays = torch.ones_like(stays)

    if length is None:
        length = input_ids.shape[1] if nothing_removed else int(stays.sum(-1).max())
    # A stable sort of booleans moves the columns to remove to the left and keeps the order of the others.
    order = torch.sort(stays.to(torch.uint8), dim=-1, stable=True).indices[:, input_ids.shape[1] - length :]
    kept = stays.gather(-1, order)
    mask = (attended.gather(-1, order) & kept).long()
    return PromptPlan(order, kept, mask, input_ids.shape[1])


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy integer tensors to the CPU in one transfer, as every transfer makes the host wait for the device."""
    elsewhere = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    if not elsewhere:
        return dict(tensors)
    device = next(iter(elsewhere.values())).device
    flat = torch.cat([tensor.flatten().to(device, torch.long) for tensor in elsewhere.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in elsewhere.values()])
    copied = {name: part.view(tensor.shape) for (name, tensor), part in zip(elsewhere.items(), parts, strict=True)}
    return {**tensors, **copied}


def shortened_length(
    placeholder: torch.Tensor, attention_mask: torch.Tensor, kept_per_row: torch.Tensor, layout: str
) -> int:
    """Return L2, the columns of the shortened prompt, from tensors on the CPU.

    Args:
        placeholder: (B, L) bool, true at image placeholders.
        attention_mask: (B, L), nonzero for real tokens.
        kept_per_row: (B,) long, features that stay in every row; fewer in all than there are placeholders.
        layout: see ``plan_prompt``.
    """
    attended = attention_mask != 0
    others = attended if layout == "left" else attended.cumsum(-1) > 0
    return int(((others & ~placeholder).sum(-1) + kept_per_row).max())


def check_placeholders(found: int, num_cells: int, image_token_id: int) -> None:
    """Check that a prompt has a placeholder for every feature.

    Raises:
        ValueError: naming both numbers.
    """
    if found != num_cells:
        raise ValueError(
            f"the prompt has {found} image placeholders (token id {image_token_id}) but the images give {num_cells} "
            "features; pass the images and text of the same processor call, and do not truncate the text"
        )


def shifted_index(index: torch.Tensor, plan: PromptPlan) -> torch.Tensor:
    """Map column numbers, counted from the left of the original prompt, to the ``suffix`` layout.

    Raises:
        ValueError: if a column lies left of the shortened prompt.
    """
    shifted = torch.where(index < 0, index + plan.length, index - plan.removed)
    if index.numel() and int(shifted.min()) < 0:
        raise ValueError(
            f"logits_to_keep asks for column {int(index.min())}, which the shortened prompt of {plan.length} columns "
            f"(of {plan.original_length}) no longer has; ask for columns after the last image"
        )
    return shifted
