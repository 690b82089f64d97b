"""Tiny random models of the five families and inputs for them; no tokenizer, no network.

Reached through the fixtures of ``conftest.py``: ``tiny_model(family)`` gives a ``Tiny`` with ``model`` and
``inputs(rows)``; ``new_tiny_model(family)`` gives one that a test may change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

FAMILY_NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
VOCAB, WIDTH = 200, 64
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 190, 191, 192, 193
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN_GRIDS = ((4, 6), (6, 4), (2, 8), (8, 8))  # patches; a visual token is 2 x 2 of them
INTERN_TILES = (1, 2, 3)


def _clip(image_size: int = 32) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        projection_dim=32,
    )


def _llava(**changes: Any) -> nn.Module:
    config = LlavaConfig(
        vision_config=_clip(), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config)


def _llava_phi() -> nn.Module:
    config = LlavaConfig(
        vision_config=_clip(), text_config=PhiConfig(**TEXT), image_token_index=IMAGE, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": WIDTH, "patch_size": 8, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **SPECIAL)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **SPECIAL)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> nn.Module:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "patch_size": 8,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **SPECIAL))


def _internvl() -> nn.Module:
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[64, 64],
        patch_size=[8, 8],
    )
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=16
    )
    return InternVLForConditionalGeneration(config)


BUILDERS = {
    "llava": _llava,
    "llava_phi": _llava_phi,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}


def build_tiny_model(family: str, seed: int = 0) -> nn.Module:
    """Return a new random float32 model in eval mode that generates without an end token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[family]()
        with torch.no_grad():  # larger weights than the initialisation, so that wrong positions or features show
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0 if "embed" not in name else 8.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def coarse_decoder_weight(width: int = WIDTH, readings: int = 3, seed: int = 0) -> torch.Tensor:
    """Return a (VOCAB, width) matrix under which features read as few different tokens, so that runs occur."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(readings, width, generator=generator)
    scale = 1 - 0.004 * torch.arange(VOCAB)
    return directions[torch.arange(VOCAB) % readings] * scale[:, None]


@dataclass
class Tiny:
    """A tiny model and a factory of inputs for it."""

    family: str
    model: nn.Module

    def inputs(self, rows: list[str], padding: str = "left", seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
        """Build model inputs.

        Args:
            rows: one string per prompt; ``t`` is a text token, ``i`` an image with its delimiters, e.g. ``"ttittt"``.
            padding: ``left`` or ``right``.
            seed: of pixels and text.
            options: ``video=True`` lets ``v`` in a row stand for a video (Qwen models).
        """
        generator = torch.Generator().manual_seed(seed)
        make = {"llava": self._square_image, "llava_phi": self._square_image, "internvl": self._tiles}
        make_image = make.get(self.family, self._qwen_image)
        sequences, pixels, grids, videos, video_grids = [], [], [], [], []
        for row in rows:
            ids = [BOS]
            for item in row:
                if item == "t":
                    ids.append(int(torch.randint(10, 180, (1,), generator=generator)))
                elif item == "v":
                    pixel, grid, count = self._qwen_image(1, generator, frames=2)
                    videos.append(pixel)
                    video_grids.append(grid)
                    blocks = 2 if self.family == "qwen3_vl" else 1  # Qwen3-VL delimits every frame
                    ids += ([VISION_START] + [VIDEO] * (count // blocks) + [VISION_END]) * blocks
                else:
                    pixel, grid, count = make_image(len(pixels), generator)
                    pixels.append(pixel)
                    grids.append(grid)
                    ids += [VISION_START] + [IMAGE] * count + [VISION_END]
            sequences.append(ids)
        inputs = _padded(sequences, padding)
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        if videos:
            inputs |= {"pixel_values_videos": torch.cat(videos), "video_grid_thw": torch.tensor(video_grids)}
        if self.family.startswith("qwen"):
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
            if pixels:
                inputs["image_grid_thw"] = torch.tensor(grids)
        return inputs

    def __iter__(self) -> Iterator[Any]:
        """Allow ``model, inputs = tiny_model(family)``."""
        yield self.model
        yield self.inputs

    def single(self, inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        """Cut one prompt with its images out of a batch, without padding."""
        ids = [r[m.bool()] for r, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        starts = [int(((r[:-1] == VISION_START) & (r[1:] == IMAGE)).sum()) for r in ids]
        first, count = sum(starts[:row]), starts[row]
        chosen: dict[str, torch.Tensor] = {
            "input_ids": ids[row][None],
            "attention_mask": torch.ones_like(ids[row])[None],
        }
        if "mm_token_type_ids" in inputs:
            chosen["mm_token_type_ids"] = inputs["mm_token_type_ids"][row][inputs["attention_mask"][row].bool()][None]
        if count and "image_grid_thw" in inputs:
            patches = inputs["image_grid_thw"].prod(-1)
            begin, end = int(patches[:first].sum()), int(patches[: first + count].sum())
            chosen["image_grid_thw"] = inputs["image_grid_thw"][first : first + count]
            chosen["pixel_values"] = inputs["pixel_values"][begin:end]
        elif count:
            cells = [int((r == IMAGE).sum()) // 16 for r in ids]
            chosen["pixel_values"] = inputs["pixel_values"][sum(cells[:row]) : sum(cells[: row + 1])]
        return chosen

    def _square_image(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, Any, int]:
        return torch.randn(1, 3, 32, 32, generator=generator), None, 16

    def _tiles(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, Any, int]:
        tiles = INTERN_TILES[index % len(INTERN_TILES)]
        return torch.randn(tiles, 3, 64, 64, generator=generator), None, tiles * 16

    def _qwen_image(
        self, index: int, generator: torch.Generator, frames: int = 1
    ) -> tuple[torch.Tensor, list[int], int]:
        height, width = QWEN_GRIDS[index % len(QWEN_GRIDS)]
        patch = self.model.model.visual.config
        pixel = torch.randn(
            frames * height * width, 3 * patch.temporal_patch_size * patch.patch_size**2, generator=generator
        )
        return pixel, [frames, height, width], frames * height * width // 4


def _padded(sequences: list[list[int]], padding: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        span = slice(longest - len(sequence), None) if padding == "left" else slice(0, len(sequence))
        ids[row, span], mask[row, span] = torch.tensor(sequence), 1
    return {"input_ids": ids, "attention_mask": mask}
