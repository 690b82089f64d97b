"""What is trained: layers by family, modes by part, float32 for what is trained, and a table that says so."""

import pytest
import torch
from torch import nn

from dualstream.modeling import apply_rope_scaling
from dualstream.modeling.auto import MODEL_CLASSES
from dualstream.train.sft_parts import (
    add_lora,
    base_model,
    chosen_layers,
    format_table,
    part_modules,
    part_of,
    set_trained,
    table_dict,
    trained_table,
)

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
LLM = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
# Written by hand from the published architectures: layers inside a vision block, and of the connector.
VISION = {
    "llava": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"},
    "qwen2_vl": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
    "qwen2_5_vl": {"attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "qwen3_vl": {"attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"},
    "internvl": {
        *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer"),
        *("mlp.fc1", "mlp.fc2"),
    },
}
CONNECTOR = {
    "llava": {"linear_1": 1, "linear_2": 1},
    "qwen2_vl": {"mlp.0": 1, "mlp.2": 1},
    "qwen2_5_vl": {"mlp.0": 1, "mlp.2": 1},
    "qwen3_vl": {"linear_fc1": 3, "linear_fc2": 3},  # two deepstack mergers beside the last one
    "internvl": {"linear_1": 1, "linear_2": 1},
}
BLOCKS = {"llava": 3, "qwen2_vl": 2, "qwen2_5_vl": 2, "qwen3_vl": 3, "internvl": 2}
ALL = {"vision": "lora", "connector": "lora", "llm": "lora"}
FROZEN = dict.fromkeys(ALL, "frozen")
TOWER = {"llava": "model.vision_tower.", "internvl": "model.vision_tower."}
JOIN = {"llava": "model.multi_modal_projector.", "internvl": "model.multi_modal_projector."}


def owner(family, name):
    """The part of a parameter, told from its name by hand."""
    name = name.removeprefix("base_model.model.")
    if name.startswith(JOIN.get(family, "model.visual.merger.")) or ".deepstack_merger_list." in name:
        return "connector"
    return "vision" if name.startswith(TOWER.get(family, "model.visual.")) else "llm"


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_reaches_exactly_the_layers_of_the_published_architecture(new_tiny_model, family):
    model = add_lora(new_tiny_model(family).model, ALL, r=2, lora_alpha=4)
    set_trained(model, ALL)
    rows = {row.part: row for row in trained_table(model, ALL)}
    assert rows["vision"].layers == dict.fromkeys(VISION[family], BLOCKS[family])
    assert rows["connector"].layers == CONNECTOR[family]
    assert rows["llm"].layers == dict.fromkeys(LLM, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert sum(row.trained for row in rows.values()) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ALL)
def test_a_full_part_is_trained_whole_and_alone(new_tiny_model, family, part):
    model = new_tiny_model(family).model
    modes = FROZEN | {part: "full"}
    set_trained(model, modes)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (owner(family, name) == part), name
    row = next(row for row in trained_table(model, modes) if row.part == part)
    assert row.trained == row.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_full_and_lora_can_be_mixed(new_tiny_model):
    modes = {"vision": "lora", "connector": "full", "llm": "frozen"}
    model = add_lora(new_tiny_model("qwen2_vl").model, modes, r=2)
    set_trained(model, modes)
    for name, parameter in model.named_parameters():
        part = owner("qwen2_vl", name)
        assert parameter.requires_grad == (part == "connector" or (part == "vision" and ".lora_" in name)), name
    assert base_model(model).get_output_embeddings().weight.requires_grad is False


def test_chosen_targets_are_matched_by_the_end_of_their_names(new_tiny_model):
    model = new_tiny_model("qwen2_vl").model
    found = chosen_layers(model, ALL, ["qkv", "q_proj", "mlp.0"])
    assert set(found.values()) == {"attn.qkv", "self_attn.q_proj", "mlp.0"}
    one = add_lora(model, {"llm": "lora"}, ["layers.1.self_attn.v_proj"], r=2)
    adapted = {name for name, m in one.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"base_model.model.model.language_model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("modes", "targets", "words"),
    [
        ({"vision": "lora"}, ["q_proj", "v_proj"], "no layer of the vision; it has attn.proj, attn.qkv"),
        ({"llm": "lora"}, ["q_proj", "qkv"], "'qkv' matches no layer"),
        ({"llm": "lora"}, ["proj"], "no layer of the llm"),  # part of a name is not its end
        ({"llm": "lora"}, ["lm_head"], "no layer of the llm"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(tiny_model, modes, targets, words):
    with pytest.raises(ValueError, match=words):
        add_lora(tiny_model("qwen2_vl").model, modes, targets)


def test_trained_weights_are_float32_beside_a_bfloat16_base(new_tiny_model):
    model = new_tiny_model("qwen2_vl").model.to(torch.bfloat16)
    modes = {"vision": "lora", "connector": "full", "llm": "lora"}
    model = add_lora(model, modes, r=2)
    set_trained(model, modes)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_learned_rope_table_is_trained_though_the_tower_is_frozen(new_tiny_model):
    model = new_tiny_model("qwen2_vl").model
    apply_rope_scaling(model, "table:99:8")
    modes = FROZEN | {"llm": "full"}
    set_trained(model, modes)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("model.visual.")} == {
        name for name, _ in model.named_parameters() if name.endswith("log_scale")
    }
    row = next(row for row in trained_table(model, modes) if row.part == "rope table")
    assert row.trained == row.parameters > 0


def test_the_visual_decoder_is_never_trained(tiny_models):
    stock = tiny_models.build_tiny_model("qwen2_vl")
    model = MODEL_CLASSES["qwen2_vl"](MODEL_CLASSES["qwen2_vl"].config_class(**stock.config.to_dict()))
    modes = dict.fromkeys(ALL, "full")
    set_trained(model, modes)
    assert not any(p.requires_grad for p in model.visual_decoder.parameters())
    rows = {row.part: row for row in trained_table(model, modes)}
    assert rows["other"].trained == 0 and rows["other"].parameters == model.visual_decoder.weight.numel()


def test_tied_weights_are_counted_once(tiny_models, new_tiny_model):
    tiny = new_tiny_model("qwen2_vl")
    config = tiny.model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = type(tiny.model)(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    modes = FROZEN | {"llm": "full"}
    set_trained(model, modes)
    row = next(row for row in trained_table(model, modes) if row.part == "llm")
    body = sum(p.numel() for n, p in model.model.language_model.named_parameters())
    assert row.trained == body


def test_the_table_tells_when_the_model_does_not_match_it(new_tiny_model):
    model = new_tiny_model("qwen2_vl").model
    set_trained(model, FROZEN | {"llm": "full"})
    with pytest.raises(RuntimeError, match="the vision is 'full' but 0 of its"):
        trained_table(model, FROZEN | {"vision": "full", "llm": "full"})


def test_the_table_reads_well(new_tiny_model):
    modes = FROZEN | {"vision": "lora"}
    model = add_lora(new_tiny_model("qwen2_5_vl").model, modes, r=2)
    set_trained(model, modes)
    rows = trained_table(model, modes)
    text = format_table(rows)
    assert "attn.qkv x2" in text and text.splitlines()[-1].startswith("all")
    assert table_dict(rows)[0]["part"] == "vision"
    assert part_of("base_model.model.model.visual.merger.mlp.0.weight", part_modules(base_model(model))) == "connector"
    assert isinstance(base_model(nn.Linear(1, 1)), nn.Linear)
