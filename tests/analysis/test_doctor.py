"""The support card on all five families, and checks that fail when the thing they check is broken."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, GraniteConfig, LlavaConfig, LlavaForConditionalGeneration

from dualstream.analysis import doctor, model_checks
from dualstream.analysis.causality.knockouts import knockout as knockout_module
from dualstream.cli import main

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


def check(model, processor):
    checks, card = doctor.check_model(lambda: (model, processor))
    return {each.name: each for each in checks}, card


def failed(checks):
    return [name for name, each in checks.items() if not each.ok]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_card_without_a_failure(family, tiny_model, publishing):
    checks, card = check(tiny_model(family).model, publishing.make_processor(family))
    assert {name: checks[name].detail for name in failed(checks)} == {}
    assert not [name for name, each in checks.items() if each.limited]
    assert list(checks) == ["load", *doctor.CHECKS]
    assert card["family"] == family and card["language blocks"] == card["blocks that can be cut"] == 2
    assert card["parameters"] == sum(p.numel() for p in tiny_model(family).model.parameters())
    assert (card["deepstack layers"] > 0) == (family == "qwen3_vl")
    assert any("tiles" in limit for limit in card["limits"]) == (family == "internvl")
    json.dumps(card)


def test_deepstack_features_carry_the_picture_past_an_ablation_of_the_input(tiny_model, publishing):
    checks, _ = check(tiny_model("qwen3_vl").model, publishing.make_processor("qwen3_vl"))
    detail = checks["ablation of all visual tokens"].detail
    assert "now by 0.0e+00" in detail and float(detail.rsplit(" ", 1)[1]) > 0


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_both_kernels_are_cut(kernel, new_tiny_model, publishing):
    model = new_tiny_model("qwen2_vl").model
    model.set_attn_implementation(kernel)
    checks, card = check(model, publishing.make_processor("qwen2_vl"))
    assert failed(checks) == [] and card["attention kernel"] == kernel


def test_a_kernel_without_masks_is_a_limit_and_no_failure(tiny_model, publishing, monkeypatch):
    model = tiny_model("llava").model
    support = knockout_module.knockout_support
    monkeypatch.setattr(
        knockout_module,
        "knockout_support",
        lambda m: SimpleNamespace(
            **{**support(m).__dict__, "kernel": "flash_attention_2", "problem": "takes no mask"}
        ),
    )
    checks, card = check(model, publishing.make_processor("llava"))
    assert failed(checks) == [] and checks["knockout of all visual tokens"].limited
    assert checks["knockout of all visual tokens"].mark == "limit"
    assert "no attention knockout: takes no mask" in card["limits"]


def test_blocks_that_cannot_be_cut_are_named(tiny_model, publishing, monkeypatch):
    model = tiny_model("llava").model
    found = knockout_module.knockout_support(model)
    partial = {**found.__dict__, "cuttable": (1,), "reasons": {0: "linear_attention: no softmax attention"}}
    monkeypatch.setattr(knockout_module, "knockout_support", lambda m: SimpleNamespace(**partial))
    checks, card = check(model, publishing.make_processor("llava"))
    assert checks["knockout of all visual tokens"].limited
    assert "1 of 2 blocks cannot be cut (linear_attention" in checks["knockout of all visual tokens"].detail
    assert any("leaves out blocks [0]" in limit for limit in card["limits"])


def test_a_knockout_that_does_nothing_is_caught(tiny_model, publishing, monkeypatch):
    @contextlib.contextmanager
    def nothing(model, blocks, verify=True):
        yield SimpleNamespace(largest_blocked_weight=0.0)

    monkeypatch.setattr(knockout_module, "knockout", nothing)
    checks, _ = check(tiny_model("llava").model, publishing.make_processor("llava"))
    assert failed(checks) == ["knockout of nothing, of one destination", "knockout of all visual tokens"]


def test_an_edit_that_leaves_the_pixels_in_is_caught(tiny_model, publishing, monkeypatch):
    from dualstream.analysis import interventions

    @contextlib.contextmanager
    def nothing(model, edit, deepstack=True):
        yield

    monkeypatch.setattr(interventions, "edited_features", nothing)
    checks, _ = check(tiny_model("llava").model, publishing.make_processor("llava"))
    assert failed(checks) == ["ablation of all visual tokens"]


def test_a_model_that_ignores_its_picture_passes_no_check_of_interventions(new_tiny_model, publishing):
    """Equal answers to two pictures say nothing if the answers were equal before."""
    model = new_tiny_model("llava").model
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    checks, _ = check(model, publishing.make_processor("llava"))
    assert {"ablation of all visual tokens", "knockout of all visual tokens"} <= set(failed(checks))


def test_a_processor_of_another_patch_size_is_caught(tiny_model, publishing):
    processor = publishing.make_processor("llava")
    processor.patch_size = 16
    checks, _ = check(tiny_model("llava").model, processor)
    assert "image spans" in failed(checks)


@pytest.mark.parametrize("text_class", [Gemma2Config, GraniteConfig])
def test_lens_identity_with_other_language_models(text_class, tiny_models, publishing):
    """T1 for language models that alone would cap or scale their logits; inside LLaVA they do not."""
    extra = {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "logits_scaling": 4.0}
    config = LlavaConfig(
        vision_config=tiny_models._clip(),
        text_config=text_class(**tiny_models.TEXT, **extra),
        image_token_index=tiny_models.IMAGE,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model, processor = LlavaForConditionalGeneration(config).eval(), publishing.make_processor("llava")
    ok, detail = model_checks.check_lens(model, processor, model_checks.probe_inputs(model, processor))
    assert ok, detail


def test_logits_that_are_capped_behind_the_head_fail_the_lens(tiny_model, publishing):
    model, processor = tiny_model("llava").model, publishing.make_processor("llava")
    inputs = model_checks.probe_inputs(model, processor)

    def cap(_, args, output):
        output.logits = 3 * torch.tanh(output.logits / 3)

    handle = model.register_forward_hook(cap)
    try:
        assert not model_checks.check_lens(model, processor, inputs)[0]
    finally:
        handle.remove()
    assert model_checks.check_lens(model, processor, inputs)[0]


def test_command_prints_the_card_and_fails_with_a_failed_check(capsys, monkeypatch):
    assert main(["doctor", "tiny-qwen2-vl", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["ok"] and payload["card"]["family"] == "qwen2_vl"
    assert {each["name"] for each in payload["checks"]} == {"load", *doctor.CHECKS}
    assert main(["doctor", "tiny-qwen2-vl"]) == 0
    text = capsys.readouterr().out
    assert "  ok     knockout of all visual tokens" in text and "attention kernel: sdpa" in text and "limits:" in text
    monkeypatch.setattr(model_checks, "check_grid", lambda *_: (False, "8x8, geometry says 8x9"))
    assert main(["doctor", "tiny-qwen2-vl"]) == 1
    assert "  FAIL   grid: 8x8, geometry says 8x9" in capsys.readouterr().out
