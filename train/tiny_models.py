"""Builds the two tiny vision-language models and their processors: real architectures, small sizes, random weights."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from .tiny_tokenizer import build_tokenizer

FAMILIES: tuple[str, ...] = ("llava", "qwen2_vl")
TOKEN_PIXELS = 12  # width of the square of model pixels behind one visual token, both families
MERGE = 2  # Qwen2-VL merges 2 x 2 patches into one visual token


@dataclass
class TinyModelConfig:
    """Sizes of one tiny model.

    Attributes:
        family: "llava" (CLIP ViT + Llama) or "qwen2_vl" (2-D RoPE ViT + M-RoPE).
        vocab_size: Tokenizer entries.
        image_size: Side of the model's square input picture in pixels; a multiple of 12.
        vision_width: Width of the vision tower.
        vision_depth: Blocks of the vision tower. LLaVA reads the output of the last but one, as the real one does.
        vision_heads: Attention heads of the vision tower.
        vision_ratio: MLP width of the vision tower divided by its width.
        width: Width of the language model.
        depth: Blocks of the language model.
        heads: Attention heads of the language model.
        mlp: MLP width of the language model.
    """

    family: str = "llava"
    vocab_size: int = 672
    image_size: int = 96
    vision_width: int = 96
    vision_depth: int = 5
    vision_heads: int = 4
    vision_ratio: int = 4
    width: int = 128
    depth: int = 5
    heads: int = 4
    mlp: int = 320

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; accepted are {', '.join(FAMILIES)}.")
        if self.image_size % TOKEN_PIXELS:
            raise ValueError(f"image_size is {self.image_size}; accepted are multiples of {TOKEN_PIXELS}.")


def build_processor(config: TinyModelConfig) -> ProcessorMixin:
    """The stock processor of the family, sized for the tiny model."""
    tokenizer = build_tokenizer(config.family, config.vocab_size)
    side = config.image_size
    if config.family == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=TOKEN_PIXELS,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    # The slack of one row keeps rounding in `smart_resize` from turning a square picture into 7 x 7 tokens.
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": side * side * 3 // 4, "longest_edge": side * (side + 1)},
        "patch_size": TOKEN_PIXELS // MERGE,
        "merge_size": MERGE,
    }
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )


def build_model(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The stock model class of the family with random weights (seed torch before the call)."""
    return _llava(config, tokenizer) if config.family == "llava" else _qwen2_vl(config, tokenizer)


def _text_sizes(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _llava(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_width * config.vision_ratio,
        num_hidden_layers=config.vision_depth,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=TOKEN_PIXELS,
        projection_dim=config.vision_width,
    )
    text = LlamaConfig(**_text_sizes(config, tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.image_token_id,
            image_seq_length=(config.image_size // TOKEN_PIXELS) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    return _with_generation_ids(model, tokenizer)


def _qwen2_vl(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    frequencies = config.width // config.heads // 2
    side = 3 * frequencies // 8  # the real checkpoints split 64 rotary frequencies into 16 (t), 24 (h) and 24 (w)
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [frequencies - 2 * side, side, side],
    }
    vision = {
        "depth": config.vision_depth,
        "embed_dim": config.vision_width,
        "hidden_size": config.width,
        "mlp_ratio": config.vision_ratio,
        "num_heads": config.vision_heads,
        "patch_size": TOKEN_PIXELS // MERGE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    token_ids = {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }
    text = {**_text_sizes(config, tokenizer), "rope_parameters": rope}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **token_ids))
    return _with_generation_ids(model, tokenizer)


def _with_generation_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
