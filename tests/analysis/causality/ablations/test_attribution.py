"""Integrated gradients: completeness, target, visual tokens only, batched; attribution patching (T12, D2, D3)."""

import numpy as np
import pytest
import torch

from dualstream.analysis.causality.ablations.attribution import attribution_patching, integrated_gradients
from dualstream.analysis.causality.ablations.replacement import Reference
from dualstream.analysis.causality.prompt_rows import feature_layers, prompt_rows, visual_counts, with_layers
from dualstream.analysis.interventions import edited_features, encoded_images
from dualstream.modeling.families import FAMILIES, flatten_features

MODELS = [*FAMILIES, "llava_phi"]
ROWS = ["ttitttt", "itt"]
TARGETS = [7, 23]


def baseline(output):
    """A reference with another mean at every stage."""
    generator = torch.Generator().manual_seed(5)
    stages = [(stage, number) for stage, number, _ in feature_layers(output)]
    return Reference(means={stage: torch.randn(64, generator=generator) * 0.3 for stage in stages})


def prepared(tiny, rows=ROWS):
    inputs = tiny.inputs(rows)
    with torch.no_grad():
        output = encoded_images(tiny.model, inputs)
    return inputs, output, baseline(output)


@torch.no_grad()
def logit(model, inputs, row, token, edit=None):
    if edit is None:
        return float(model(**inputs).logits[row, -1, token])
    with edited_features(model, edit):
        return float(model(**inputs).logits[row, -1, token])


@pytest.mark.parametrize("name", MODELS)
def test_completeness_improves_with_steps_and_change_is_the_models(name, tiny_model):
    tiny = tiny_model(name)
    inputs, output, reference = prepared(tiny)
    errors = []
    for steps in (1, 8, 64):
        found = integrated_gradients(tiny.model, inputs, output, TARGETS, reference, steps=steps)
        errors.append(max(item.error / max(abs(item.change), 1e-3) for item in found))
    assert errors[2] < 0.02 and errors[2] < errors[1] < errors[0] + 1e-6

    def to_mean(states, place):
        return reference.means[place.stage, place.number].expand_as(states)

    for row, (item, token) in enumerate(zip(found, TARGETS, strict=True)):
        change = logit(tiny.model, inputs, row, token) - logit(tiny.model, inputs, row, token, to_mean)
        assert item.change == pytest.approx(change, abs=2e-3)
        assert item.error == pytest.approx(abs(item.signed.sum() - item.change), abs=1e-9)
        assert (item.magnitude >= np.abs(item.signed) - 1e-9).all()
        assert len(item.signed) == visual_counts(tiny.model, inputs)[row]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl"])
def test_batched_rows_and_small_passes_equal_single_prompts(name, tiny_model):
    tiny = tiny_model(name)
    inputs, output, reference = prepared(tiny)
    together = integrated_gradients(tiny.model, inputs, output, TARGETS, reference, steps=4, rows_per_pass=3)
    for row, token in enumerate(TARGETS):
        single = tiny.single(inputs, row)
        with torch.no_grad():
            alone = encoded_images(tiny.model, single)
        (item,) = integrated_gradients(tiny.model, single, alone, [token], reference, steps=4)
        assert np.allclose(item.signed, together[row].signed, atol=2e-3, rtol=1e-2)
        assert np.array_equal(item.ranking()[:3], together[row].ranking()[:3])


@pytest.mark.parametrize("name", MODELS)
def test_attribution_patching_is_the_slope_of_replacing_one_token(name, tiny_model):
    """Against finite differences of the real model."""
    tiny = tiny_model(name)
    inputs, output, reference = prepared(tiny, ["ttitttt"])
    (found,) = attribution_patching(tiny.model, inputs, output, [7], reference)
    model = tiny.model.double()
    try:
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        step = 1e-4
        for token in (0, 3):

            def nudge(states, place, token=token):
                mean = reference.means[place.stage, place.number].to(states)
                new = states.clone()
                new[token] += step * (mean - states[token])
                return new

            slope = (logit(model, wide, 0, 7) - logit(model, wide, 0, 7, nudge)) / step
            assert found.signed[token] == pytest.approx(slope, rel=2e-2, abs=2e-3)
    finally:
        model.float()


def test_another_target_gives_another_attribution_and_nothing_is_left_behind(tiny_model):
    tiny = tiny_model("llava")
    inputs, output, reference = prepared(tiny)
    before = flatten_features(output.pooler_output).clone()
    first = integrated_gradients(tiny.model, inputs, output, [7, 7], reference, steps=2)
    second = integrated_gradients(tiny.model, inputs, output, [8, 8], reference, steps=2)
    assert not np.allclose(first[0].signed, second[0].signed)
    assert torch.equal(flatten_features(output.pooler_output), before)
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    with pytest.raises(ValueError, match="steps must be"):
        integrated_gradients(tiny.model, inputs, output, TARGETS, reference, steps=0)
    with pytest.raises(ValueError, match="one per prompt"):
        integrated_gradients(tiny.model, inputs, output, [7], reference)


@pytest.mark.parametrize("name", MODELS)
def test_repeated_rows_answer_as_the_original(name, tiny_model):
    tiny = tiny_model(name)
    inputs, output, _ = prepared(tiny)
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        rows = tiny.model(**prompt_rows(tiny.model, inputs, output, [1, 0, 1])).logits
        sizes = visual_counts(tiny.model, inputs)
        same = with_layers(output, [values for _, _, values in feature_layers(output)], sizes)
        assert torch.equal(tiny.model(**prompt_rows(tiny.model, inputs, same, [0, 1])).logits, plain)
    for place, row in enumerate((1, 0, 1)):
        real = inputs["attention_mask"][row].bool()
        assert torch.allclose(rows[place][real], plain[row][real], atol=1e-3)
    with pytest.raises(ValueError, match="holds no image"):
        prompt_rows(tiny.model, tiny.inputs(["ttt", "tit"]), output, [0])
