"""A tiny random tower for every rotary class of the table, and a forward pass through it."""

import functools
import importlib
from dataclasses import fields

import pytest
import torch

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_attention_heads": 2,
    "depth": 2,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
DEEPSTACK = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
POSITIONS = {"pos_emb_height": 8, "pos_emb_width": 8}
MUSE = {**POSITIONS, "max_position_embeddings": 64}
# Rotary class -> folder, configuration, tower, settings besides COMMON, order of the rotated channels.
MODELS = {
    "CohereCompassVisionRotaryEmbedding": (
        "cohere_compass",
        "CohereCompassVisionConfig",
        "CohereCompassVisionModel",
        DEEPSTACK,
        "h w h w",
    ),
    "DINOv3ViTRopePositionEmbedding": ("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", {"image_size": 24}, ""),
    "Dots3NoteVisionRotaryEmbedding": (
        "dots3_note",
        "Dots3NoteVisionConfig",
        "Dots3NoteVisionModel",
        {
            "moe_intermediate_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense", "dense"],
            "per_layer_config": {},
        },
        "h w h w",
    ),
    "Ernie4_5_VLMoeVisionRotaryEmbedding": (
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeVisionConfig",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        {},
        "h w h w",
    ),
    "Exaone4_5_VisionRotaryEmbedding": (
        "exaone4_5",
        "Exaone4_5_VisionConfig",
        "Exaone4_5_VisionModel",
        {**WINDOWS, "num_key_value_heads": 1},
        "h w h w",
    ),
    "Gemma4VisionRotaryEmbedding": (
        "gemma4",
        "Gemma4VisionConfig",
        "Gemma4VisionModel",
        {"head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 64, "pooling_kernel_size": 2},
        "w w h h",
    ),
    "Glm4vVisionRotaryEmbedding": ("glm4v", "Glm4vVisionConfig", "Glm4vVisionModel", {"image_size": 32}, "h w h w"),
    "Glm4vMoeVisionRotaryEmbedding": (
        "glm4v_moe",
        "Glm4vMoeVisionConfig",
        "Glm4vMoeVisionModel",
        {"image_size": 32},
        "h w h w",
    ),
    "Glm5NextVisionRotaryEmbedding": (
        "glm5_next",
        "Glm5NextVisionConfig",
        "Glm5NextVisionModel",
        {"image_size": 32, "projection_intermediate_size": 32},
        "h w h w",
    ),
    "GlmOcrVisionRotaryEmbedding": (
        "glm_ocr",
        "GlmOcrVisionConfig",
        "GlmOcrVisionModel",
        {"image_size": 32},
        "h w h w",
    ),
    "Inkling2VisionRotaryEmbedding": (
        "inkling2",
        "Inkling2VisionConfig",
        "Inkling2VisionModel",
        {"posemb_grid_size": 8, "projection_hidden_dim": 32, "text_hidden_size": 32},
        "ww hh",
    ),
    "Kimi_K25VisionRotaryEmbedding": (
        "kimi_k25",
        "Kimi_K25VisionConfig",
        "Kimi_K25VisionModel",
        POSITIONS,
        "wh wh",
    ),
    "Lfm3VlVisionRotaryEmbedding": (
        "lfm3_vl",
        "Lfm3VlVisionConfig",
        "Lfm3VlVisionModel",
        {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        "h w h w",
    ),
    "Llama4VisionRotaryEmbedding": (
        "llama4",
        "Llama4VisionConfig",
        "Llama4VisionModel",
        {
            "image_size": 24,
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        "",
    ),
    "MLCDRotaryEmbedding": ("mlcd", "MLCDVisionConfig", "MLCDVisionModel", {"image_size": 24}, "h w h w"),
    "MiniMaxM3VLVisionRotaryEmbedding": (
        "minimax_m3_vl",
        "MiniMaxM3VLVisionConfig",
        "MiniMaxM3VLVisionModel",
        {"image_size": 32},
        "t h w t h w",
    ),
    "MuseGlimmerVisionRotaryEmbedding": (
        "muse_glimmer",
        "MuseGlimmerVisionConfig",
        "MuseGlimmerVisionModel",
        MUSE,
        "w h w h",
    ),
    "MuseSparkVisionRotaryEmbedding": (
        "muse_spark",
        "MuseSparkVisionConfig",
        "MuseSparkVisionModel",
        MUSE,
        "w h w h",
    ),
    "PaddleOCRVisionRotaryEmbedding": (
        "paddleocr_vl",
        "PaddleOCRVisionConfig",
        "PaddleOCRVisionModel",
        {"image_size": 32},
        "h w h w",
    ),
    "PixtralVisionRotaryEmbedding": (
        "pixtral",
        "PixtralVisionConfig",
        "PixtralVisionModel",
        {"image_size": 32},
        "h w h w",
    ),
    "Qwen2VLVisionRotaryEmbedding": (
        "qwen2_vl",
        "Qwen2VLVisionConfig",
        "Qwen2VisionTransformerPretrainedModel",
        {"embed_dim": 32},
        "h w h w",
    ),
    "Qwen2_5OmniVisionRotaryEmbedding": (
        "qwen2_5_omni",
        "Qwen2_5OmniVisionEncoderConfig",
        "Qwen2_5OmniVisionEncoder",
        WINDOWS,
        "h w h w",
    ),
    "Qwen2_5_VLVisionRotaryEmbedding": (
        "qwen2_5_vl",
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        WINDOWS,
        "h w h w",
    ),
    "Qwen3OmniMoeVisionRotaryEmbedding": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeVisionEncoderConfig",
        "Qwen3OmniMoeVisionEncoder",
        DEEPSTACK,
        "h w h w",
    ),
    "Qwen3VLMoeVisionRotaryEmbedding": (
        "qwen3_vl_moe",
        "Qwen3VLMoeVisionConfig",
        "Qwen3VLMoeVisionModel",
        DEEPSTACK,
        "h w h w",
    ),
    "Qwen3VLVisionRotaryEmbedding": (
        "qwen3_vl",
        "Qwen3VLVisionConfig",
        "Qwen3VLVisionModel",
        DEEPSTACK,
        "h w h w",
    ),
    "Qwen3_5MoeVisionRotaryEmbedding": (
        "qwen3_5_moe",
        "Qwen3_5MoeVisionConfig",
        "Qwen3_5MoeVisionModel",
        {"num_position_embeddings": 64},
        "h w h w",
    ),
    "Qwen3_5VisionRotaryEmbedding": (
        "qwen3_5",
        "Qwen3_5VisionConfig",
        "Qwen3_5VisionModel",
        {"num_position_embeddings": 64},
        "h w h w",
    ),
    "Qwen4ExpVisionRotaryEmbedding": (
        "qwen4_exp",
        "Qwen4ExpVisionConfig",
        "Qwen4ExpVisionModel",
        {"num_position_embeddings": 64},
        "h w h w",
    ),
    "Sam3ViTRotaryEmbedding": (
        "sam3",
        "Sam3ViTConfig",
        "Sam3ViTModel",
        {"image_size": 24, "pretrain_image_size": 24, "window_size": 2, "global_attn_indexes": [1]},
        "ww hh",
    ),
    "Step3p7VisionRotaryEmbedding": (
        "step3p7",
        "Step3p7VisionConfig",
        "Step3p7VisionModel",
        {"image_size": 24, "max_position_embeddings": 36},
        "w h w h",
    ),
    "VideoLlama3VisionRotaryEmbedding": (
        "video_llama_3",
        "VideoLlama3VisionConfig",
        "VideoLlama3VisionModel",
        {},
        "h w h w",
    ),
}
IMAGE_TOWERS = ("dinov3_vit", "llama4", "mlcd", "pixtral", "sam3", "step3p7")
WITH_POSITIONS = [name for name, row in MODELS.items() if row[4]]
EVERY = pytest.mark.parametrize("name", list(MODELS))
GIVEN_POSITIONS = pytest.mark.parametrize("name", WITH_POSITIONS)


@functools.cache
def tower(name):
    """A tiny random tower; tests leave it as they found it."""
    folder, config_name, model_name, settings, _ = MODELS[name]
    package = f"transformers.models.{folder}"
    config_class = getattr(importlib.import_module(f"{package}.configuration_{folder}"), config_name)
    known = {field.name for field in fields(config_class)}
    config = config_class(**{key: value for key, value in COMMON.items() if key in known} | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(importlib.import_module(f"{package}.modeling_{folder}"), model_name)(config).eval()
        for parameter in model.parameters():  # towers start tokens and projections at zero, which hides positions
            parameter.data.normal_(std=0.3)
    return model


def run(name, grids=((4, 6),)):
    """One forward pass on images of these patch grids; returns (features, what the rotary module got and gave)."""
    from dualstream.modeling.rope_towers import vision_rotaries

    model, folder = tower(name), MODELS[name][0]
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=generator)
    patches = sum(h * w for h, w in grids)
    grid = torch.tensor([[1, h, w] for h, w in grids])
    config = model.config
    if folder in IMAGE_TOWERS:
        size = (16, 24) if folder in ("mlcd", "pixtral", "dinov3_vit") else (24, 24)
        arguments = (noise(1, 3, *size),)
    elif folder == "gemma4":
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        arguments = (noise(1, 24, 48), torch.stack([columns, rows], -1).reshape(1, 24, 2))
    elif folder == "inkling2":
        arguments = (noise(6, 8, 8, 3), torch.tensor([[1, 2, 3]]))
    elif folder == "kimi_k25":
        arguments = (noise(patches, 3, 4, 4), grid)
    elif folder == "video_llama_3":
        arguments = (noise(patches, 48), grid, torch.tensor([2] * len(grids)))
    elif folder == "paddleocr_vl":
        arguments = (noise(1, patches, 3, 4, 4), grid)
    else:
        frames = getattr(config, "temporal_patch_size", None) or getattr(config, "patch_temporal", 1)
        frames = 1 if folder in ("dots3_note", "ernie4_5_vl_moe") else frames
        arguments = (noise(patches, 48 * frames), grid)
    extra = {"cu_seqlens": grid.prod(-1).cumsum(0).int()} if folder == "paddleocr_vl" else {}
    if extra:
        extra["cu_seqlens"] = torch.nn.functional.pad(extra["cu_seqlens"], (1, 0))
    seen = []
    handles = [
        module.register_forward_hook(lambda m, inputs, output: seen.append((m, inputs, output)))
        for module in vision_rotaries(model).values()
    ]
    try:
        with torch.no_grad():
            output = model(*arguments, **extra)
    finally:
        for handle in handles:
            handle.remove()
    return output[0] if isinstance(output, tuple) else output.last_hidden_state, seen
