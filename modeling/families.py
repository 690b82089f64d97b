"""Where things are in each supported model family: tower, connector, language model, norm, head and feature grid.

Adding a family is one small class here and one row in ``FAMILIES``.
"""

import math
from typing import Any

import torch
from torch import nn

VISUAL_DECODER_SUFFIX, ROPE_SCALED_SUFFIX = "_visual_decoder", "_rope_scaled"


def stock_model_type(model_type: str) -> str:
    """Name of the stock family behind a model type, e.g. ``llava`` for ``llava`` and ``llava_visual_decoder``."""
    return model_type.removesuffix(VISUAL_DECODER_SUFFIX).removesuffix(ROPE_SCALED_SUFFIX)


def attribute_at(module: Any, *paths: str) -> Any:
    """Return the first existing dotted attribute.

    Raises:
        AttributeError: naming the module and the paths tried.
    """
    for path in paths:
        found = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise AttributeError(f"{type(module).__name__} has none of the attributes {', '.join(paths)}")


def flatten_features(features: Any) -> torch.Tensor:
    """Concatenate connector features, a sequence of (n_i, d) or a tensor (blocks, n, d), to (N, d)."""
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([block.reshape(-1, block.shape[-1]) for block in features])


def block_sizes(features: Any) -> list[int]:
    """Return the number of tokens of every feature block."""
    return [math.prod(block.shape[:-1]) for block in features]


class Family:
    """Accessors of one model family; `model` is always the ``...ForConditionalGeneration`` model."""

    name: str
    image_input_names: tuple[str, ...] = ("pixel_values",)
    has_mrope = False

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """Return the vision transformer."""
        return attribute_at(model, "model.vision_tower")

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the blocks of the vision transformer."""
        return attribute_at(
            self.vision_tower(model),
            "encoder.layers",
            "encoder.layer",
            "vision_model.encoder.layers",
            "transformer.layers",
            "blocks",
        )

    def connector(self, model: nn.Module) -> nn.Module:
        """Return the module that maps vision states to language-model inputs."""
        return attribute_at(model, "model.multi_modal_projector")

    def language_model(self, model: nn.Module) -> nn.Module:
        """Return the language model without its head."""
        return attribute_at(model, "model.language_model")

    def llm_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the blocks of the language model."""
        return attribute_at(self.language_model(model), "layers")

    def final_norm(self, model: nn.Module) -> nn.Module:
        """Return the norm between the last block and the head."""
        return attribute_at(self.language_model(model), "norm", "final_layernorm")

    def unembedding(self, model: nn.Module) -> nn.Linear:
        """Return the output head, a linear map from d to the vocabulary."""
        return model.get_output_embeddings()

    def image_token_id(self, config: Any) -> int:
        """Return the id of the image placeholder."""
        return config.image_token_id

    def feature_blocks(self, model: nn.Module, image_inputs: dict[str, Any], features: Any) -> torch.Tensor:
        """Return the grid of every feature block.

        Args:
            model: the model.
            image_inputs: what was passed to ``get_image_features``.
            features: its ``pooler_output``: a sequence of (n_i, d) or a tensor (blocks, n, d).

        Returns:
            (n_blocks, 2) long on the CPU: height and width in visual tokens; blocks follow the feature order.
        """
        raise NotImplementedError

    def image_of_block(
        self, model: nn.Module, image_inputs: dict[str, Any], grids: torch.Tensor, input_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Return (n_blocks,) long on the CPU: the image each block belongs to, counted over the whole batch."""
        return torch.arange(len(grids))


class LlavaFamily(Family):
    """LLaVA with a CLIP-like tower (square or rectangular input) or Pixtral (`image_sizes`)."""

    name = "llava"
    image_input_names = ("pixel_values", "image_sizes")

    def feature_blocks(self, model: nn.Module, image_inputs: dict[str, Any], features: Any) -> torch.Tensor:
        """See ``Family``. A block that is no h x w grid (a kept class token) counts as one row."""
        patch = self.vision_tower(model).config.patch_size
        if image_inputs.get("image_sizes") is not None:
            pixels = torch.as_tensor(image_inputs["image_sizes"]).cpu().long()
        else:
            pixels = torch.tensor([image_inputs["pixel_values"].shape[-2:]] * len(features)).reshape(-1, 2)
        sizes = torch.tensor(block_sizes(features), dtype=torch.long)
        grids = pixels // patch
        as_row = torch.stack([torch.ones_like(sizes), sizes], dim=1)
        return torch.where((grids.prod(-1) == sizes)[:, None], grids, as_row)


class QwenVLFamily(Family):
    """Qwen2-VL and its successors: native resolution, 2x2 merger, M-RoPE."""

    image_input_names = ("pixel_values", "image_grid_thw")
    has_mrope = True

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """Return the vision transformer."""
        return attribute_at(model, "model.visual")

    def connector(self, model: nn.Module) -> nn.Module:
        """Return the patch merger."""
        return attribute_at(model, "model.visual.merger")

    def feature_blocks(self, model: nn.Module, image_inputs: dict[str, Any], features: Any) -> torch.Tensor:
        """See ``Family``; a block is one temporal slice of an image."""
        grid = torch.as_tensor(image_inputs["image_grid_thw"]).cpu().long()
        merged = grid[:, 1:] // self.vision_tower(model).spatial_merge_size
        return merged.repeat_interleave(grid[:, 0], dim=0)

    def image_of_block(
        self, model: nn.Module, image_inputs: dict[str, Any], grids: torch.Tensor, input_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``Family``."""
        slices = torch.as_tensor(image_inputs["image_grid_thw"]).cpu().long()[:, 0]
        return torch.arange(len(slices)).repeat_interleave(slices)


class Qwen2VLFamily(QwenVLFamily):
    """Qwen2-VL."""

    name = "qwen2_vl"


class Qwen2_5_VLFamily(QwenVLFamily):
    """Qwen2.5-VL; features leave the windowed tower in raster order."""

    name = "qwen2_5_vl"


class Qwen3VLFamily(QwenVLFamily):
    """Qwen3-VL, with deepstack features beside the connector output."""

    name = "qwen3_vl"


class InternVLFamily(Family):
    """InternVL: square tiles, several per image, features as one tensor (tiles, n, d)."""

    name = "internvl"

    def feature_blocks(self, model: nn.Module, image_inputs: dict[str, Any], features: Any) -> torch.Tensor:
        """See ``Family``; a block is one tile."""
        side = math.isqrt(features.shape[1])
        return torch.tensor([[side, side]] * len(features), dtype=torch.long).reshape(-1, 2)

    def image_of_block(
        self, model: nn.Module, image_inputs: dict[str, Any], grids: torch.Tensor, input_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``Family``; the tiles of one image are one unbroken stretch of placeholders."""
        if input_ids is None or len(grids) == 0:
            return torch.arange(len(grids))
        placeholder = input_ids.cpu() == self.image_token_id(model.config)
        before = nn.functional.pad(placeholder, (1, 0))[:, :-1]
        stretch = (placeholder & ~before).flatten().cumsum(0)[placeholder.flatten()] - 1
        first = grids.prod(-1).cumsum(0) - grids.prod(-1)
        return stretch[first]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LlavaFamily(), Qwen2VLFamily(), Qwen2_5_VLFamily(), Qwen3VLFamily(), InternVLFamily())
}


def family_of(model_or_config: Any) -> Family:
    """Return the family of a model or configuration, stock or of a class of ours.

    Raises:
        ValueError: for an unsupported model type, naming the supported ones.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = str(getattr(config, "model_type", None))
    family = FAMILIES.get(stock_model_type(model_type))
    if family is None:
        raise ValueError(
            f"model type {model_type!r} ({type(model_or_config).__name__}) is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return family
