"""Every tower of the table: a tiny random one, its scaled rotation recomputed by hand, and its forward pass."""

import functools
import importlib
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers

from dualstream.modeling import ROTARY_TOWERS, RopeScaling, apply_rope_scaling, remove_rope_scaling, rope_scaled
from dualstream.modeling.rope_modules import grid_lengths
from dualstream.modeling.rope_towers import stock_frequencies, tower_of, vision_rotaries

torch.set_num_threads(1)

# Axial tables of the memory attention of video segmentation: no part of a vision tower.
LEFT_OUT = {
    "EdgeTamVideoVisionRotaryEmbedding",
    "Sam2VideoVisionRotaryEmbedding",
    "Sam3TrackerVideoVisionRotaryEmbedding",
}
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


def test_the_table_is_complete():
    """No axial rotary class of the installed transformers is missing from the table, none is there in vain."""
    defined = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for block in re.split(r"^(?=class )", path.read_text(), flags=re.MULTILINE):
            if "def compute_axial_rope_parameters" in block:
                defined.add(re.match(r"class (\w+)", block).group(1))
    unusual = {"DINOv3ViTRopePositionEmbedding", "Llama4VisionRotaryEmbedding"}
    assert defined - LEFT_OUT == set(ROTARY_TOWERS) - unusual
    assert set(MODELS) == set(ROTARY_TOWERS)


@EVERY
def test_frequencies_follow_from_the_configuration(name):
    for module in vision_rotaries(tower(name)).values():
        row, config = tower_of(module), module.config
        frequencies = stock_frequencies(module)
        base = config.rope_theta if row.form == "coordinates" else config.rope_parameters["rope_theta"]
        torch.testing.assert_close(frequencies.double(), base ** -row.ratios(len(frequencies)), rtol=1e-6, atol=0)
        if row.form != "complex":
            assert torch.equal(module.inv_freq, frequencies)


def expected_angles(name, module, positions, g):
    """(..., channels) angles by the definition, and nothing of the package: position x theta_i x g_i."""
    config, count, columns = module.config, len(stock_frequencies(module)), ROTARY_TOWERS[name].columns
    base = config.rope_parameters["rope_theta"]
    angles = {}
    for column, axis in enumerate(columns):
        ratios = [i / count for i in range(count)]
        if MODELS[name][0] == "pixtral":
            ratios = ratios[0::2] if axis == "h" else ratios[1::2]
        scaled = torch.tensor([base**-r * g(axis, r) for r in ratios], dtype=torch.float64)
        angles[axis] = positions[..., column, None].double() * scaled
    parts = []
    for word in MODELS[name][4].split():
        stacked = torch.stack([angles[axis] for axis in word], -1)  # "wh": one frequency of w, one of h, the next of w
        parts.append(stacked.flatten(-2))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("axes", ["both", "h", "w"])
@GIVEN_POSITIONS
def test_scaled_rotation_equals_the_formula(name, axes):
    g = lambda axis, ratio: 1 + 99 * ratio**4 if axis in ("h", "w") and axes in ("both", axis) else 1.0
    with rope_scaled(tower(name), RopeScaling("poly", alpha=99, p=4, axes=axes)):
        _, seen = run(name)
        assert seen
        for module, (_, positions), (cos, sin) in seen:
            angles = expected_angles(name, module, positions, g)
            torch.testing.assert_close(cos.double().reshape(angles.shape), angles.cos(), rtol=0, atol=3e-6)
            torch.testing.assert_close(sin.double().reshape(angles.shape), angles.sin(), rtol=0, atol=3e-6)


@GIVEN_POSITIONS
def test_columns_are_named_right(name):
    """Patches come row by row (of an image or of a merge block): a step that moves one coordinate moves w."""
    columns = ROTARY_TOWERS[name].columns
    moved = {"h": 0, "w": 0, "t": 0}
    _, seen = run(name)
    for _, (_, positions), _ in seen:
        steps = positions.reshape(-1, len(columns)).diff(dim=0)
        for step in steps[(steps != 0).sum(-1) == 1]:
            moved[columns[int(step.nonzero())]] += 1
    assert moved["w"] > moved["h"]
    assert moved["t"] == 0


@EVERY
def test_forward_changes_and_comes_back_bit_for_bit(name):
    model = tower(name)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    before, _ = run(name)
    with rope_scaled(model, "poly:0"):
        assert torch.equal(run(name)[0], before)
    with rope_scaled(model, "poly:99:4"):
        assert list(model.state_dict()) == keys
        assert float((run(name)[0] - before).abs().max()) > 1e-5
    assert torch.equal(run(name)[0], before)
    assert [type(module) for module in model.modules()] == classes
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys() and all(torch.equal(after[key], buffers[key]) for key in buffers)


@EVERY
def test_learned_table_starts_at_its_poly_and_has_gradients(name):
    model = tower(name)
    if ROTARY_TOWERS[name].form == "coordinates":
        with pytest.raises(ValueError, match="one fixed scaling of both axes"):
            apply_rope_scaling(model, "table:99:4")
        return
    with rope_scaled(model, "poly:99:4"):
        fixed, _ = run(name)
    try:
        apply_rope_scaling(model, "table:99:4")
        torch.testing.assert_close(run(name)[0], fixed, rtol=1e-3, atol=1e-4)
        for module in vision_rotaries(model).values():
            frequencies = module.frequency_tables()
            (gradient,) = torch.autograd.grad(frequencies.sum(), module.log_scale)
            row = ROTARY_TOWERS[name]
            g = 1 + 99 * row.ratios(gradient.shape[-1]) ** 4
            expected = (stock_frequencies(module).double() * g).float().expand_as(gradient)
            torch.testing.assert_close(gradient, expected)
    finally:
        remove_rope_scaling(model)


PACKED = [name for name in WITH_POSITIONS if ROTARY_TOWERS[name].packed and MODELS[name][0] not in IMAGE_TOWERS]


@pytest.mark.parametrize("name", PACKED)
def test_grid_sizes_choose_a_table_per_image_and_axis(name):
    """Packed images of 4x6, 8x4 and 6x10 patches: each axis rotates by the table of its own length."""
    model, grids = tower(name), ((4, 6), (8, 4), (6, 10))
    factors = {4: 2.0, 8: 3.0, 99: 5.0}
    count = len(stock_frequencies(next(iter(vision_rotaries(model).values()))))
    values = [[[factor] * count] * 2 for factor in factors.values()]
    _, stock = run(name, grids)
    with rope_scaled(model, RopeScaling("table", values=values, grid_sizes=tuple(factors))):
        _, scaled = run(name, grids)
    sizes = torch.cat([torch.tensor([[h, w]] * (h * w)) for h, w in grids])
    stretch = lambda length: next(factor for size, factor in factors.items() if length <= size)
    scale = torch.tensor([[stretch(int(h)), stretch(int(w))] for h, w in sizes])
    for (module, (x, positions), _), (_, _, (cos, sin)) in zip(stock, scaled, strict=True):
        assert torch.equal(grid_lengths(positions), sizes)
        expected = module(x, positions.double() * scale)
        torch.testing.assert_close((cos, sin), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [name for name, row in ROTARY_TOWERS.items() if not row.packed])
def test_towers_whose_positions_hide_the_grid_refuse_grid_sizes(name):
    with pytest.raises(ValueError, match=r"grid_sizes needs|one fixed scaling"):
        apply_rope_scaling(tower(name), RopeScaling("table", learned=True, grid_sizes=(8, 16)))


@pytest.mark.parametrize("axes", ["both", "h", "w"])
def test_llama4_table_by_hand(axes):
    model = tower("Llama4VisionRotaryEmbedding")
    side, count, base = 6, 4, model.config.rope_parameters["rope_theta"]
    with rope_scaled(model, RopeScaling("poly", alpha=99, p=4, axes=axes)):
        table = model.rotary_embedding.freqs_ci.clone()
    learned = RopeScaling("table", alpha=99, p=4, learned=True, axes=axes)
    with rope_scaled(model, learned), torch.no_grad():
        torch.testing.assert_close(model.rotary_embedding(torch.empty(0)), table, rtol=0, atol=1e-4)
    assert table.shape == model.rotary_embedding.freqs_ci.shape == (side * side + 1, 1, 2 * count)
    for patch in range(side * side):
        for channel in range(2 * count):
            i, axis = channel % count, "w" if channel < count else "h"
            position = (patch % side if axis == "w" else patch // side) + 1
            g = 1 + 99 * (i / count) ** 4 if axes in ("both", axis) else 1
            angle = position * base ** -(i / count) * g
            value = complex(table[patch, 0, channel])
            assert value == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=2e-5)
    assert torch.equal(table[-1], torch.ones_like(table[-1]))


def test_llama4_stock_table_is_reproduced():
    """With factors of one on one axis and another scaled by nearly nothing, the table is the stock one."""
    model = tower("Llama4VisionRotaryEmbedding")
    stock = model.rotary_embedding.freqs_ci.clone()
    with rope_scaled(model, RopeScaling("table", values=[1.0, 1.0, 1.0, 1 + 1e-12])):
        torch.testing.assert_close(model.rotary_embedding.freqs_ci, stock, rtol=0, atol=1e-6)


def test_llama4_keeps_its_rotations_when_cast():
    model = tower("Llama4VisionRotaryEmbedding")
    with rope_scaled(model.rotary_embedding, "poly:99:4"):
        before = model.rotary_embedding.freqs_ci.clone()
        model.rotary_embedding.half()
        assert torch.equal(model.rotary_embedding.freqs_ci, before)
    model.rotary_embedding.freqs_ci = model.rotary_embedding._compute_freqs_ci(model.config)


def test_dinov3_rotation_by_hand():
    model = tower("DINOv3ViTRopePositionEmbedding")
    (rotary,) = vision_rotaries(model).values()
    count = len(stock_frequencies(rotary))
    with rope_scaled(model, "poly:99:4"), torch.no_grad():
        cos, _ = rotary(torch.empty(1, 3, 16, 24))
    centres = [((2 * i + 1) / 4 - 1, (2 * j + 1) / 6 - 1) for i in range(4) for j in range(6)]
    theta = [model.config.rope_theta ** -(i / count) * (1 + 99 * (i / count) ** 4) for i in range(count)]
    expected = [[math.cos(2 * math.pi * c * t) for _ in range(2) for c in pair for t in theta] for pair in centres]
    torch.testing.assert_close(cos, torch.tensor(expected), rtol=0, atol=2e-5)
    for axes in ("h", "w"):
        with pytest.raises(ValueError, match="DINOv3 tower shares its frequencies"):
            apply_rope_scaling(model, RopeScaling(axes=axes))


def test_the_documented_table_is_the_table_in_code():
    page = (Path(__file__).parents[2] / "docs" / "rope_towers.md").read_text()
    documented = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and "`" in cells[1]:
            documented[cells[1].split("`")[1]] = (cells[0], cells[2], *(cell.split(",")[0] for cell in cells[3:]))
    said = lambda value: "yes" if value else "no"
    assert documented == {
        name: (
            row.name,
            ", ".join(row.columns),
            said(row.form != "coordinates"),
            said(row.form != "coordinates"),
            said(row.packed),
        )
        for name, row in ROTARY_TOWERS.items()
    }
