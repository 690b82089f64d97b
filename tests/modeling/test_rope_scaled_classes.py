"""The classes with scaled rotary frequencies: what they compute, save and load, alone and with a visual decoder."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from dualstream.modeling import (
    LlavaWithVisualDecoder,
    Qwen2VLRopeScaled,
    Qwen2VLRopeScaledConfig,
    Qwen2VLWithVisualDecoder,
    Qwen2VLWithVisualDecoderConfig,
    RopeScaling,
    VisualDecoder,
    apply_rope_scaling,
    compressing,
    freeze_rope_scaling,
    infer_class,
    remove_rope_scaling,
    rope_scaling_of,
)
from dualstream.modeling.auto import MODEL_CLASSES, ROPE_SCALED_CLASSES
from dualstream.modeling.rope_towers import vision_rotaries

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SCALING = "poly:99:1"
FACTORS = torch.tensor([1, 50.5])  # the tiny towers have the ratios 0 and 1/2
LEARNED = "table:9:1"  # a table of parameters that starts at poly:9:1
START = torch.tensor([1, 5.5])
LOG_SCALE = "model.visual.rotary_pos_emb.log_scale"
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
BOTH_CLASSES = pytest.mark.parametrize("classes", [ROPE_SCALED_CLASSES, MODEL_CLASSES], ids=["scaled", "decoder"])


@pytest.fixture(scope="module")
def stock_folder(tiny_model, tmp_path_factory):
    """Function family -> folder with a stock checkpoint."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).model.save_pretrained(made[family])
        return made[family]

    return get


def rotary(model):
    (module,) = vision_rotaries(model).values()
    return module


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def scaled_by_hand(model, factors):
    """A stock model whose buffer is multiplied in place, the definition of a scaling."""
    by_hand = copy.deepcopy(model)
    rotary(by_hand).inv_freq *= factors
    return by_hand


def learned_model(folder):
    """A model whose learned table has moved away from its start."""
    model = Qwen2VLRopeScaled.from_pretrained(folder, vision_rope_scaling=LEARNED)
    with torch.no_grad():
        rotary(model).log_scale += torch.tensor([[[0.1, -0.2], [0.3, 0.7]]])
    return model


@BOTH_CLASSES
@EVERY_FAMILY
def test_scaled_as_by_hand_and_the_same_after_saving(family, classes, tiny_model, stock_folder, tmp_path):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["titt", "tti"])
    ours = classes[family].from_pretrained(stock_folder(family), vision_rope_scaling=SCALING)
    expected = logits(scaled_by_hand(tiny.model, FACTORS), inputs)
    assert (expected - logits(tiny.model, inputs)).abs().max() > 1e-3
    assert torch.allclose(logits(ours, inputs), expected, atol=1e-5)
    assert ours.config.vision_rope_scaling == {"type": "poly", "axes": "both", "alpha": 99.0, "p": 1.0}
    ours.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["vision_rope_scaling"] == ours.config.vision_rope_scaling
    assert stored["model_type"] == ours.config.model_type and stored["auto_map"]
    for loader in (classes[family], AutoModel, AutoModelForImageTextToText):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is classes[family] and str(rope_scaling_of(again)) == SCALING
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(logits(again, inputs), logits(ours, inputs))
    remove_rope_scaling(again)
    assert again.config.vision_rope_scaling is None
    assert torch.equal(logits(again, inputs), logits(tiny.model, inputs))


@EVERY_FAMILY
def test_without_a_scaling_they_are_stock(family, tiny_model, stock_folder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["titt"])
    for more in ({}, {"vision_rope_scaling": None}, {"vision_rope_scaling": "poly:0"}):
        ours = ROPE_SCALED_CLASSES[family].from_pretrained(stock_folder(family), **more)
        assert type(rotary(ours)) is type(rotary(tiny.model)) and ours.config.vision_rope_scaling is None
        labelled = {**inputs, "labels": inputs["input_ids"]}
        for a, b in zip(ours(**labelled).to_tuple()[:2], tiny.model(**labelled).to_tuple()[:2], strict=True):
            assert torch.equal(a, b)  # the loss and the logits
        options = {**inputs, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(ours.generate(**options), tiny.model.generate(**options))


@BOTH_CLASSES
def test_axes_and_tables_survive_saving(classes, stock_folder, tmp_path):
    cases = ["poly:9:1:h", "exp:3:w", RopeScaling("table", values=((1, 2), (3, 4))), "table:9:1:w",
             RopeScaling("table", values=((((1, 2), (3, 4)), ((5, 6), (7, 8)))), grid_sizes=(4, 9))]  # fmt: skip
    for index, scaling in enumerate(cases):
        ours = classes["qwen2_vl"].from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=scaling)
        ours.save_pretrained(tmp_path / str(index))
        again = classes["qwen2_vl"].from_pretrained(tmp_path / str(index))
        assert torch.equal(rotary(again).inv_freq, rotary(ours).inv_freq)
        assert rope_scaling_of(again) == rope_scaling_of(ours) and type(rotary(again)) is type(rotary(ours))


@pytest.mark.parametrize("scaling", [SCALING, "poly:9:1:h", LEARNED])
@BOTH_CLASSES
@EVERY_FAMILY
def test_frequencies_stay_float32_when_loaded_in_bf16(family, classes, scaling, stock_folder, tmp_path):
    exact = classes[family].from_pretrained(stock_folder(family), vision_rope_scaling=scaling)
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        from_stock = classes[family].from_pretrained(stock_folder(family), vision_rope_scaling=scaling, dtype=dtype)
        from_stock.save_pretrained(folder)
        for model in (from_stock, classes[family].from_pretrained(folder)):
            assert model.dtype == dtype and model.model.visual.blocks[0].attn.qkv.weight.dtype == dtype
            module = rotary(model)
            assert module.inv_freq.dtype == torch.float32
            assert torch.equal(module.inv_freq, rotary(exact).inv_freq)
            if scaling == LEARNED:
                assert module.log_scale.dtype == torch.float32
                assert torch.equal(module.log_scale, rotary(exact).log_scale)
            remove_rope_scaling(model)
            assert torch.equal(rotary(model).inv_freq, rotary(exact).unscaled)


@pytest.mark.parametrize("scaling", [SCALING, LEARNED])
def test_copies_are_independent(scaling, tiny_model, stock_folder):
    inputs = tiny_model("qwen2_vl").inputs(["titt"])
    ours = Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=scaling)
    before, twin = logits(ours, inputs), copy.deepcopy(ours)
    assert torch.equal(logits(twin, inputs), before)
    apply_rope_scaling(twin, "exp:3")
    assert str(rope_scaling_of(twin)) == "exp:3" and rope_scaling_of(ours) != rope_scaling_of(twin)
    assert torch.equal(logits(ours, inputs), before)


def test_a_learned_table_is_saved_and_restored(tiny_model, stock_folder, tmp_path):
    inputs = tiny_model("qwen2_vl").inputs(["titt", "it"])
    ours = learned_model(stock_folder("qwen2_vl"))
    ours.save_pretrained(tmp_path)
    assert LOG_SCALE in load_file(tmp_path / "model.safetensors")
    stored = json.loads((tmp_path / "config.json").read_text())["vision_rope_scaling"]
    factors = rotary(ours).log_scale.detach().exp()
    assert torch.allclose(torch.tensor(stored["values"]), factors) and stored["learned"]
    again, info = Qwen2VLRopeScaled.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(rotary(again).log_scale, rotary(ours).log_scale) and rotary(again).log_scale.requires_grad
    assert torch.equal(logits(again, inputs), logits(ours, inputs))


def test_a_frozen_table_needs_no_parameter(tiny_model, stock_folder, tmp_path):
    inputs = tiny_model("qwen2_vl").inputs(["titt", "it"])
    ours = learned_model(stock_folder("qwen2_vl"))
    before = logits(ours, inputs)
    freeze_rope_scaling(ours)
    ours.save_pretrained(tmp_path)
    again = Qwen2VLRopeScaled.from_pretrained(tmp_path)
    assert LOG_SCALE not in again.state_dict() and not rope_scaling_of(again).learned
    assert torch.allclose(logits(again, inputs), before, atol=1e-5)


@pytest.mark.parametrize("override", [None, SCALING, "table:3:1", "table:3:1:h"])
def test_an_override_replaces_what_was_learned(override, stock_folder, tmp_path):
    learned_model(stock_folder("qwen2_vl")).save_pretrained(tmp_path)
    again, info = Qwen2VLRopeScaled.from_pretrained(tmp_path, vision_rope_scaling=override, output_loading_info=True)
    fresh = Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=override)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert rope_scaling_of(again) == rope_scaling_of(fresh)
    assert again.config.vision_rope_scaling == fresh.config.vision_rope_scaling
    assert again.state_dict().keys() == fresh.state_dict().keys()


def test_a_lost_learned_table_starts_from_the_configuration(stock_folder, tmp_path):
    """The values that were reached stand in config.json too; without them the table starts at its formula."""
    ours = learned_model(stock_folder("qwen2_vl"))
    ours.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[LOG_SCALE]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Qwen2VLRopeScaled.from_pretrained(tmp_path)
    assert torch.allclose(rotary(again).log_scale, rotary(ours).log_scale, atol=1e-6)
    config = Qwen2VLRopeScaledConfig.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=LEARNED)
    started = Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), config=config)
    assert torch.allclose(rotary(started).log_scale.exp(), START.expand(1, 2, 2))


@pytest.mark.parametrize("scaling", [SCALING, LEARNED])
def test_a_model_from_a_configuration_is_scaled(scaling, tiny_model):
    settings = tiny_model("qwen2_vl").model.config.to_dict()
    for model_class, config_class in (
        (Qwen2VLRopeScaled, Qwen2VLRopeScaledConfig),
        (Qwen2VLWithVisualDecoder, Qwen2VLWithVisualDecoderConfig),
    ):
        model = model_class(config_class(**settings, vision_rope_scaling=scaling))
        module = rotary(model)
        if scaling == SCALING:
            assert torch.allclose(module.inv_freq, module.unscaled * FACTORS)
        else:
            assert torch.allclose(module.frequency_tables(), module.unscaled * START)


def test_training_moves_the_table_and_peft_keeps_it(tiny_model, stock_folder, tmp_path):
    inputs = tiny_model("qwen2_vl").inputs(["tittt"])
    base = Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=LEARNED)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["rotary_pos_emb"])
    wrapped = get_peft_model(base, lora)
    wrapped.train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    merged = wrapped.merge_and_unload().eval()
    assert type(merged) is Qwen2VLRopeScaled
    assert (rotary(merged).log_scale - START.log()).abs().max() > 0.01
    merged.save_pretrained(tmp_path)
    again = Qwen2VLRopeScaled.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


# ---------------------------------------------------------------- with a visual decoder


@EVERY_FAMILY
def test_one_checkpoint_scales_and_compresses(family, tiny_model, stock_folder, coarse_decoder, tmp_path):
    """Its answers are those of a stock model scaled by hand inside ``compressing``."""
    tiny = tiny_model(family)
    ours = MODEL_CLASSES[family].from_pretrained(stock_folder(family), vision_rope_scaling=SCALING)
    ours.set_visual_decoder(coarse_decoder)
    ours.config.visual_compression = "rle"
    ours.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = tiny.inputs(["titt", "it"])
    by_hand = scaled_by_hand(tiny.model, FACTORS)
    options = {**inputs, "max_new_tokens": 4, "do_sample": False}
    with compressing(by_hand, method="rle", decoder=coarse_decoder):
        expected, report = by_hand.generate(**options), by_hand.last_compression
    assert torch.equal(again.generate(**options), expected)
    assert again.last_compression.kept_tokens == report.kept_tokens < report.visual_tokens


def test_a_scaled_checkpoint_gets_a_decoder(tiny_model, stock_folder, tmp_path):
    """The class with a visual decoder reads a checkpoint of the scaled class; its own, only that class reads."""
    inputs = tiny_model("qwen2_vl").inputs(["titt"])
    scaled = learned_model(stock_folder("qwen2_vl"))
    scaled.save_pretrained(tmp_path / "scaled")
    both, info = Qwen2VLWithVisualDecoder.from_pretrained(tmp_path / "scaled", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(both.visual_decoder.weight, both.lm_head.weight)
    assert torch.equal(logits(both, inputs), logits(scaled, inputs))
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="is of type 'qwen2_vl_visual_decoder'"):
        Qwen2VLRopeScaled.from_pretrained(tmp_path / "both")


def test_a_decoder_beside_a_scaled_checkpoint_is_taken(tiny_models, stock_folder, tmp_path):
    scaled = Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=SCALING)
    scaled.save_pretrained(tmp_path)
    VisualDecoder.from_unembedding(tiny_models.coarse_decoder_weight()).save_pretrained(tmp_path)
    both = Qwen2VLWithVisualDecoder.from_pretrained(tmp_path)
    assert torch.equal(both.visual_decoder.weight, tiny_models.coarse_decoder_weight())
    assert str(rope_scaling_of(both)) == SCALING


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", ["cubic:9", "poly:-2", {"type": "poly", "beta": 1}, {"type": "table"}, 3])
def test_configurations_refuse_an_invalid_scaling(value, stock_folder):
    for config_class in (Qwen2VLRopeScaledConfig, Qwen2VLWithVisualDecoderConfig):
        with pytest.raises((TypeError, ValueError)):
            config_class(vision_rope_scaling=value)
        config = config_class()
        with pytest.raises((TypeError, ValueError)):
            config.vision_rope_scaling = value
        assert config.vision_rope_scaling is None
    with pytest.raises((TypeError, ValueError)):
        Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=value)


def test_configuration_round_trip(tmp_path):
    table = RopeScaling("table", values=((1, 2), (3, 4)))
    Qwen2VLRopeScaledConfig(vision_rope_scaling=table).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is Qwen2VLRopeScaledConfig and again.model_type == "qwen2_vl_rope_scaled"
    assert RopeScaling.from_any(again.vision_rope_scaling) == table


def test_a_table_of_another_tower_is_refused(stock_folder):
    with pytest.raises(ValueError, match="values has 3 frequencies, but the tower has 2"):
        Qwen2VLRopeScaled.from_pretrained(
            stock_folder("qwen2_vl"), vision_rope_scaling=RopeScaling("table", values=(1, 2, 3))
        )


def test_other_families_and_towers_are_refused(tiny_model, stock_folder, tmp_path):
    with pytest.raises(ValueError, match="is of type 'qwen3_vl'"):
        Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen3_vl"))
    tiny_model("llava").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'llava'"):
        Qwen2VLRopeScaled.from_pretrained(tmp_path)
    llava = LlavaWithVisualDecoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no vision tower with an axial rotary table"):
        apply_rope_scaling(llava, SCALING)


def test_our_class_of_a_scaled_model_is_found(stock_folder):
    scaled = Qwen2VLRopeScaled.from_pretrained(stock_folder("qwen2_vl"), vision_rope_scaling=SCALING)
    assert infer_class(scaled) is infer_class(scaled.config) is Qwen2VLWithVisualDecoder
