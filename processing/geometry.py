"""Read the token geometry of an image from a real processor, for every supported model family."""

from __future__ import annotations

import math
from typing import Any

from .token_boxes import Block, TokenGeometry

__all__ = ["Block", "TokenGeometry", "token_geometry"]


def token_geometry(processor: Any, image_size: tuple[int, int], **processor_kwargs: Any) -> TokenGeometry:
    """Rectangles of the visual tokens that `processor` makes of an image of the given size.

    All numbers are computed from the processor's own settings (resize, padding, centre crop, patch and merge size,
    tiling), so a processor changed on loading or by call arguments is followed.

    Args:
        processor: a LLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL or InternVL processor, stock or with visual decoder; both
            the torchvision and the Pillow image processors are understood.
        image_size: (width, height) of the original image in pixels, as `PIL.Image.size`.
        **processor_kwargs: the image arguments of the processor's call, flat or inside `images_kwargs`.

    Returns:
        The geometry; its length is the number of image placeholders the processor writes for the image.

    Raises:
        ValueError: if the processor is of no supported family, or `image_size` is not two positive numbers.
    """
    width, height = image_size
    if width < 1 or height < 1:
        raise ValueError(f"image_size must be a positive (width, height), got {image_size}.")
    settings = _Settings(processor, processor_kwargs)
    if settings.get("merge_size") is not None:
        blocks = _qwen_blocks(settings, width, height)
    elif settings.get("crop_to_patches") is not None:
        blocks = _internvl_blocks(settings, width, height)
    elif getattr(processor, "patch_size", None) is not None and settings.get("image_grid_pinpoints") is None:
        blocks = _llava_blocks(settings, width, height)
    else:
        raise ValueError(
            f"processor {type(processor).__name__} is of no supported family; give a LLaVA, Qwen2-VL, Qwen2.5-VL, "
            "Qwen3-VL or InternVL processor (a LLaVA processor needs its patch_size)."
        )
    return TokenGeometry((int(width), int(height)), tuple(blocks))


class _Settings:
    """Effective image settings: call arguments over the processor's defaults over the image processor's own."""

    def __init__(self, processor: Any, call: dict[str, Any]) -> None:
        self.processor = processor
        self.image_processor = getattr(processor, "image_processor", processor)
        nested = call.get("images_kwargs") or {}
        self.overrides = {**(getattr(processor, "images_kwargs", None) or {}), **call, **nested}

    def get(self, name: str) -> Any:
        """Value of one setting, None where nobody states it."""
        value = self.overrides.get(name)
        return getattr(self.image_processor, name, None) if value is None else value

    def size(self, name: str) -> dict[str, int]:
        """A size setting as a dict of the keys it really states, whatever form it was given in."""
        value = self.get(name)
        if isinstance(value, int):
            square = bool(getattr(self.image_processor, "default_to_square", True)) or name == "crop_size"
            return {"height": value, "width": value} if square else {"shortest_edge": value}
        if isinstance(value, (tuple, list)):
            return {"height": value[0], "width": value[1]}
        return {key: number for key, number in dict(value).items() if number is not None}


def _qwen_blocks(settings: _Settings, width: int, height: int) -> list[Block]:
    """One block: the whole image, resized to multiples of patch x merge pixels within the pixel budget."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    cell = settings.get("patch_size") * settings.get("merge_size")
    new_height, new_width = height, width
    if settings.get("do_resize"):
        size = settings.size("size")
        new_height, new_width = smart_resize(
            height,
            width,
            factor=cell,
            min_pixels=settings.overrides.get("min_pixels") or size["shortest_edge"],
            max_pixels=settings.overrides.get("max_pixels") or size["longest_edge"],
        )
    scaled = (cell * width / new_width, cell * height / new_height)
    return [Block(new_height // cell, new_width // cell, 0.0, 0.0, *scaled)]


def _internvl_blocks(settings: _Settings, width: int, height: int) -> list[Block]:
    """One block per tile of the canvas whose shape fits the image best, then one for the thumbnail."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    tokens = getattr(settings.processor, "image_seq_length", None)
    side = math.isqrt(tokens or 0)
    if not tokens or side * side != tokens:
        raise ValueError(f"processor.image_seq_length must be the square number of tokens per tile, got {tokens}.")
    tile_cols, tile_rows = 1, 1
    if settings.get("crop_to_patches"):
        size = settings.size("size")
        tile_cols, tile_rows = get_optimal_tiled_canvas(
            (height, width), (size["height"], size["width"]), settings.get("min_patches"), settings.get("max_patches")
        )
    tile_width, tile_height = width / tile_cols, height / tile_rows
    blocks = [
        Block(side, side, col * tile_width, row * tile_height, tile_width / side, tile_height / side)
        for row in range(tile_rows)
        for col in range(tile_cols)
    ]
    if len(blocks) > 1:
        blocks.append(Block(side, side, 0.0, 0.0, width / side, height / side, thumbnail=True))
    return blocks


def _llava_blocks(settings: _Settings, width: int, height: int) -> list[Block]:
    """One block: the image padded to a square (if asked), resized, and cropped around its centre.

    Follows CLIP's preprocessing: a pixel u of the cropped picture shows original x = (u + crop_left) * scale - pad.
    """
    patch = settings.processor.patch_size
    pad_x = pad_y = 0
    padded_width, padded_height = width, height
    if settings.get("do_pad") and hasattr(settings.image_processor, "pad_to_square"):
        padded_width = padded_height = max(width, height)
        pad_x, pad_y = (padded_width - width) // 2, (padded_height - height) // 2
    new_width, new_height = padded_width, padded_height
    if settings.get("do_resize"):
        new_width, new_height = _resized(settings.size("size"), padded_width, padded_height)
    crop_width, crop_height, left, top = new_width, new_height, 0, 0
    if settings.get("do_center_crop"):
        crop = settings.size("crop_size")
        crop_width, crop_height = crop["width"], crop["height"]
        pillow = getattr(settings.image_processor, "backend", "torchvision") == "pil"
        left, top = _crop_start(new_width, crop_width, pillow), _crop_start(new_height, crop_height, pillow)
    scale_x, scale_y = padded_width / new_width, padded_height / new_height
    return [
        Block(
            crop_height // patch,
            crop_width // patch,
            left * scale_x - pad_x,
            top * scale_y - pad_y,
            patch * scale_x,
            patch * scale_y,
        )
    ]


def _resized(size: dict[str, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) after transformers' resize to a fixed size or to a shortest edge."""
    if {"height", "width"} <= size.keys():
        return size["width"], size["height"]
    if set(size) != {"shortest_edge"}:
        raise ValueError(f"size must give height and width, or shortest_edge alone, got {size}.")
    edge = size["shortest_edge"]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _crop_start(length: int, crop: int, pillow: bool) -> int:
    """First kept pixel of a centre crop; negative where the picture is smaller and gets padded.

    The two back-ends put the odd pixel of the padding on different sides.
    """
    if crop <= length:
        return (length - crop) // 2
    return -((crop - length + 1) // 2) if pillow else -((crop - length) // 2)
