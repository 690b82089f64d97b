"""Checkpoints in the key layouts of the real Hub files load into our classes with every tensor in its place.

The layouts are written here by hand, from the key lists of the published files, without transformers' own converters.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualstream.modeling import infer_class
from dualstream.modeling.auto import ROPE_SCALED_CLASSES

FAMILIES = ("llava", "llava_phi", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
DECODER_KEYS = {"visual_decoder.weight", "visual_decoder.meaningless", "visual_decoder.text_class"}

# Prefixes of today's keys -> prefixes in the files on the Hub; first match wins.
LLAVA_LAYOUT = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
QWEN2_LAYOUT = {"model.language_model.": "model.", "model.visual.": "visual."}
HUB_LAYOUTS = {
    "llava": LLAVA_LAYOUT,  # llava-hf/llava-1.5-7b-hf
    "llava_phi": LLAVA_LAYOUT,
    "qwen2_vl": QWEN2_LAYOUT,  # Qwen/Qwen2-VL-7B-Instruct
    "qwen2_5_vl": QWEN2_LAYOUT,  # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen3_vl": {},  # Qwen/Qwen3-VL-4B-Instruct: today's keys
    "internvl": {**LLAVA_LAYOUT, "model.vision_tower.": "vision_tower."},  # OpenGVLab/InternVL3-1B-hf
}


def to_hub_layout(state, layout):
    renamed = {}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in layout if key.startswith(prefix)), "")
        renamed[layout.get(prefix, "") + key.removeprefix(prefix)] = tensor.clone()
    return renamed


def today_layout(folder, model):
    """Write the model with today's keys and return them."""
    model.save_pretrained(folder, save_original_format=False)
    return load_file(folder / "model.safetensors")


def assert_same_tensors(ours, state):
    loaded = ours.state_dict()
    for key, tensor in state.items():
        assert torch.equal(loaded[key], tensor), key
    tied = {"lm_head.weight"} if ours.config.tie_word_embeddings else set()
    assert set(loaded) - set(state) - tied == DECODER_KEYS
    assert torch.equal(ours.visual_decoder.weight, ours.lm_head.weight)
    assert ours.visual_decoder.weight.data_ptr() != ours.lm_head.weight.data_ptr()


@pytest.mark.parametrize("layout", ["hub", "today"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layout_loads_completely(family, layout, tiny_model, tmp_path):
    stock = tiny_model(family).model
    state = today_layout(tmp_path, stock)
    if layout == "hub":
        renamed = to_hub_layout(state, HUB_LAYOUTS[family])
        assert (set(renamed) != set(state)) == bool(HUB_LAYOUTS[family])
        if family == "llava":  # buffers that old files still hold
            renamed["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
            renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, info = infer_class(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_tensors(ours, state)
    # and our own file loads as completely, decoder included
    ours.save_pretrained(tmp_path / "ours")
    again, info = infer_class(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("layout", ["hub", "today"])
@pytest.mark.parametrize("family", ROPE_SCALED_CLASSES)
def test_layout_loads_completely_into_the_class_with_scaled_rope(family, layout, tiny_model, tmp_path):
    """With a scaling, fixed and learned; nothing is missing, and only a learned table is more than stock holds."""
    stock = tiny_model(family).model
    state = today_layout(tmp_path, stock)
    if layout == "hub":
        save_file(to_hub_layout(state, HUB_LAYOUTS[family]), tmp_path / "model.safetensors", metadata={"format": "pt"})
    tied = {"lm_head.weight"} if stock.config.tie_word_embeddings else set()
    for scaling, more in (
        (None, set()),
        ("poly:9:2", set()),
        ("table:9:2", {"model.visual.rotary_pos_emb.log_scale"}),
    ):
        ours, info = ROPE_SCALED_CLASSES[family].from_pretrained(
            tmp_path, vision_rope_scaling=scaling, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        loaded = ours.state_dict()
        assert set(loaded) - set(state) - tied == more
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_untied_and_tied_embeddings_and_bf16_shards(tiny_model, tmp_path):
    """InternVL (tied) and LLaVA (untied) in the Hub layout, in several files, loaded in bf16."""
    for family in ("llava", "internvl"):
        stock = tiny_model(family).model
        folder = tmp_path / family
        state = today_layout(folder, stock)
        write_shards(to_hub_layout(state, HUB_LAYOUTS[family]), folder)
        ours, info = infer_class(stock).from_pretrained(
            folder, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert ours.config.tie_word_embeddings == (family == "internvl")
        assert ours.visual_decoder.weight.dtype == torch.bfloat16
        assert_same_tensors(ours, {key: tensor.bfloat16() for key, tensor in state.items()})


def write_shards(state, folder, shards=3):
    keys = sorted(state)
    names = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: state[key] for key in keys if names[key] == name}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_flat_config_of_the_first_qwen2_vl_release(tiny_model, tmp_path):
    """Qwen2-VL's config.json has the text settings at the top level and RoPE settings under their old names."""
    stock = tiny_model("qwen2_vl").model
    state = today_layout(tmp_path, stock)
    save_file(to_hub_layout(state, QWEN2_LAYOUT), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types"):
        text.pop(name, None)
    flat = {**text, **config, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["vision_config"].pop("model_type")
    flat["torch_dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(flat))
    ours = infer_class(stock).from_pretrained(tmp_path)
    assert_same_tensors(ours, state)
    inputs = tiny_model("qwen2_vl").inputs(["tit"])
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


VISION_2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "in_chans": 3, "hidden_size": 3584, "patch_size": 14}
VISION_2_5 = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "window_size": 112, "tokens_per_second": 2}
QWEN_TEXT = {"hidden_size": 3584, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064}
MROPE = {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
# The settings of the published config.json files that differ from transformers' defaults or from today's form.
HUB_CONFIGS = {
    "llava": {
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "ignore_index": -100,
        "vocab_size": 32064,
        "text_config": {"model_type": "llama", "vocab_size": 32064, "torch_dtype": "float16", "rms_norm_eps": 1e-05},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16},
        "torch_dtype": "float16",
    },
    "qwen2_vl": {**QWEN_TEXT, **MROPE, "vision_config": VISION_2, "torch_dtype": "bfloat16"},
    "qwen2_5_vl": {**QWEN_TEXT, **MROPE, "vision_config": VISION_2_5, "tie_word_embeddings": False},
}


OUR_FIELDS = {
    "visual_compression": None,
    "visual_decoder_kind": "linear",
    "visual_decoder_classes": None,
    "visual_decoder_trained": False,
    "visual_decoder_training": None,
    "weights_from": None,
}


@pytest.mark.parametrize("family", HUB_CONFIGS)
def test_published_configurations_are_read_as_stock_reads_them(family, tiny_model, tmp_path):
    stock_class = type(tiny_model(family).model.config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **HUB_CONFIGS[family]}))
    stock = stock_class.from_pretrained(tmp_path).to_dict()
    ours = infer_class(tiny_model(family).model).config_class.from_pretrained(tmp_path).to_dict()
    assert ours.pop("model_type") == f"{stock.pop('model_type')}_visual_decoder"
    fields = OUR_FIELDS | ({"vision_rope_scaling": None} if family in ROPE_SCALED_CLASSES else {})
    assert {name: ours.pop(name) for name in fields} == fields
    assert ours == stock
