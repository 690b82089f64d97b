"""Prompts with pictures for a model of any shape, as tensors: no tokenizer and no processor takes part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualstream.modeling.families import family_of

Inputs = dict[str, torch.Tensor]


def make_inputs(
    model: nn.Module,
    image_size: tuple[int, int],
    batch: int = 1,
    images: int = 1,
    text_tokens: int = 48,
    ragged: bool = False,
    seed: int = 0,
) -> Inputs:
    """Make a batch of prompts: every row has its pictures, then text.

    Args:
        model: a supported model.
        image_size: height and width in pixels. A CLIP-like tower takes its own size only; InternVL cuts it into tiles.
        batch: rows.
        images: pictures of every row.
        text_tokens: tokens of text of every row.
        ragged: every row has one text token less than the row before, so that all but the first are padded on the
            left.
        seed: of pixels and text.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, L) int64, ``pixel_values`` in the dtype of the model, and what the
        family needs beside them, on the device of the model.

    Raises:
        ValueError: a number is not positive, or the picture does not suit the tower.
    """
    for name, value in (("batch", batch), ("images", images), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if ragged and text_tokens < batch:
        raise ValueError(f"text_tokens={text_tokens} must be at least batch={batch} where rows are ragged")
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    device: Any = model.device
    dtype: Any = model.dtype
    image_inputs, tokens = _pictures(model, image_size, batch * images, generator)
    image_token = family_of(model).image_token_id(config)
    start, end = (getattr(config, f"vision_{place}_token_id", None) for place in ("start", "end"))
    picture = [token for token in (start, *[image_token] * tokens, end) if token is not None]
    last_word = min(config.get_text_config().vocab_size, image_token) // 2
    words = torch.randint(3, last_word, (batch, text_tokens), generator=generator).tolist()
    ids, mask = _left_padded(
        [
            [*row[:1], *picture * images, *row[1 : text_tokens - (number if ragged else 0)]]
            for number, row in enumerate(words)
        ]
    )
    inputs = {"input_ids": ids, "attention_mask": mask, **image_inputs}
    if family_of(model).has_mrope:
        inputs["mm_token_type_ids"] = (ids == image_token).int()
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs


def _left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows of different lengths."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def image_inputs_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the part of the inputs that describes pictures."""
    return {name: inputs[name] for name in family_of(model).image_input_names if name in inputs}


def _pictures(
    model: nn.Module, image_size: tuple[int, int], count: int, generator: torch.Generator
) -> tuple[Inputs, int]:
    """Return the picture inputs of `count` equal pictures and how many visual tokens each has."""
    config: Any = model.config
    vision, (height, width) = config.vision_config, image_size
    if family_of(model).has_mrope:
        patch, merge = vision.patch_size, vision.spatial_merge_size
        if height % (patch * merge) or width % (patch * merge) or min(image_size) < patch * merge:
            raise ValueError(f"image_size={height}x{width} must be made of cells of {patch * merge} pixels")
        rows, columns = height // patch, width // patch
        values = 3 * vision.temporal_patch_size * patch**2
        pixels = torch.randn(1, rows * columns, values, generator=generator).expand(count, -1, -1)
        grid = torch.tensor([[1, rows, columns]] * count)
        return {"pixel_values": pixels.reshape(-1, values), "image_grid_thw": grid}, rows * columns // merge**2
    own = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    tiled = family_of(model).name == "internvl"
    if (height % own or width % own) if tiled else (height, width) != (own, own):
        raise ValueError(f"image_size={height}x{width} does not suit a tower of {own}x{own} pixels")
    tiles = (height // own) * (width // own)
    ratio = getattr(config, "downsample_ratio", 1.0) if tiled else 1.0
    per_tile = int((own // patch * ratio) ** 2)
    pixels = torch.randn(1, 3, own, own, generator=generator).expand(count * tiles, -1, -1, -1)
    return {"pixel_values": pixels.contiguous()}, tiles * per_tile
