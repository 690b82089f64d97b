"""The tests can fail: without each fix, a case that is right with it goes wrong."""

import functools

import pytest
import torch

from dualstream.modeling import compression_report
from dualstream.modeling.compressed_model import VisualCompressionMixin
from dualstream.modeling.compression_context import compressing, compressing_class
from dualstream.modeling.prompt_plan import PromptPlan
from dualstream.modeling.visual_compression import CompressionConfig

SETTINGS = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def difference(tiny, inputs, reference, decoder, config=None, **options):
    """Return max |logits - reference| over all rows and steps, teacher-forced on what was generated."""
    config = config or CompressionConfig(method="rle")
    with compressing(tiny.model, config=config, decoder=decoder) as model:
        output = model.generate(**inputs, **SETTINGS, **options)
    worst, length = 0.0, inputs["input_ids"].shape[1]
    for row in range(len(inputs["input_ids"])):
        with torch.no_grad():
            single = tiny.single(inputs, row)
            sample = reference.compress_sample(tiny.model, single, decoder.weight, {"method": "rle"}, False)
            tokens = output.sequences[row, length:].tolist()
            logits = reference.sample_logits(tiny.model, sample, tokens)[-len(tokens) - 1 : -1]
        ours = torch.stack([step[row] for step in output.logits])
        worst = max(worst, float((ours - logits).abs().max()))
    return worst


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_p1_mask_without_cache(family, tiny_model, reference, coarse_decoder, monkeypatch):
    """Without the mask, gaps in 1-D positions count as borders between packed sequences."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttittt"])
    assert difference(tiny, inputs, reference, coarse_decoder, use_cache=False) <= 5e-6
    monkeypatch.delattr(VisualCompressionMixin, "prepare_inputs_for_generation")
    assert difference(tiny, inputs, reference, coarse_decoder, use_cache=False) > 0.1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_p1_text_row_of_four(family, tiny_model, reference, coarse_decoder, monkeypatch):
    """Row 0 of M-RoPE positions has to stay contiguous where no mask protects it."""
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttitittt"])
    monkeypatch.delattr(VisualCompressionMixin, "prepare_inputs_for_generation")
    assert difference(tiny, inputs, reference, coarse_decoder, use_cache=False) <= 5e-6
    monkeypatch.setattr(PromptPlan, "positions", lambda plan, position_ids, policy: plan.gather(position_ids, 0))
    assert difference(tiny, inputs, reference, coarse_decoder, use_cache=False) > 0.1


def test_p2_signature_of_forward(tiny_model, coarse_decoder, monkeypatch):
    """A ``forward(*args, **kwargs)`` hides what the model accepts."""
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(["ttittt"])
    ours = compressing_class(type(tiny.model))
    kept = ours.forward
    monkeypatch.setattr(ours, "forward", lambda self, *args, **kwargs: kept(self, *args, **kwargs))
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        assert not model._supports_logits_to_keep()
        assert not model._supports_mm_encoder_outputs()
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model.generate(**inputs, max_new_tokens=1)


def test_p4_encoder_pass_without_gradients(tiny_model, new_tiny_model, coarse_decoder, monkeypatch):
    """Assisted decoding deep-copies the encoder output, which gradients forbid."""
    tiny, twin = tiny_model("llava"), new_tiny_model("llava").model
    inputs = tiny.inputs(["ttittt"])
    monkeypatch.setattr(VisualCompressionMixin, "generate", VisualCompressionMixin.generate.__wrapped__)
    with compressing(tiny.model, decoder=coarse_decoder) as model, pytest.raises(RuntimeError, match="deepcopy"):
        model.generate(**inputs, assistant_model=twin, max_new_tokens=3)


def test_p5_beams_with_features_in_one_tensor(tiny_model, coarse_decoder, monkeypatch):
    tiny = tiny_model("internvl")
    inputs = tiny.inputs(["ttittt", "titittttt", "itt"])
    options = {"num_beams": 2, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        right = model.generate(**inputs, **options).sequences_scores
        monkeypatch.delattr(VisualCompressionMixin, "_expand_multimodal_outputs")
        wrong = model.generate(**inputs, **options).sequences_scores
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_positions_matter(family, tiny_model, reference, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["ttitittt"])
    compact = CompressionConfig(method="rle", position_policy="compact")
    assert difference(tiny, inputs, reference, coarse_decoder, compact) > 0.1


def test_deepstack_is_merged_alike(tiny_model, reference, coarse_decoder, monkeypatch):
    """Qwen3-VL adds vision features inside the language model too; pooling them otherwise shows."""
    tiny = tiny_model("qwen3_vl")
    inputs = tiny.inputs(["ttitittt"])
    stock = compression_report.merge_features
    calls = []

    @functools.wraps(stock)
    def first_only_for_deepstack(features, plan, pooling):
        calls.append(pooling)
        return stock(features, plan, pooling if len(calls) == 1 else "first")

    monkeypatch.setattr(compression_report, "merge_features", first_only_for_deepstack)
    assert difference(tiny, inputs, reference, coarse_decoder) > 1e-3
    assert len(calls) == 3  # connector output and two deepstack layers
