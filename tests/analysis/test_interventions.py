"""Edits of visual tokens: exact for every family, batched, padded, in generate, and gone afterwards."""

import pytest
import torch

from dualstream.analysis.interventions import (
    edited_features,
    edited_output,
    edited_states,
    encoded_images,
    visual_places,
)
from dualstream.modeling.families import FAMILIES, family_of, flatten_features
from dualstream.modeling.lens import visual_features
from dualstream.modeling.lens_depths import visit_depths

MODELS = [*FAMILIES, "llava_phi"]
ROWS = ["ttitttt", "titittttt", "tttt"]


def keep(states, place):
    return states


def hooks_of(model):
    modules = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    return [type(module).__name__ for module in modules]


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_an_edit_that_keeps_everything_is_bit_identical(name, padding, tiny_model):
    model, make = tiny_model(name)
    inputs = make(ROWS, padding=padding)
    plain, before = logits_of(model, inputs), hooks_of(model)
    with edited_features(model, keep):
        assert torch.equal(logits_of(model, inputs), plain)
    for depth in range(len(family_of(model).llm_blocks(model)) + 1):
        with edited_states(model, depth, keep):
            assert torch.equal(logits_of(model, inputs), plain)
    assert hooks_of(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_edits_see_every_image_once_with_its_own_tokens(name, tiny_model):
    model, make = tiny_model(name)
    inputs, seen = make(ROWS), []

    def look(states, place):
        seen.append((place.stage, place.number, place.image, place.row, states))
        assert (inputs["input_ids"][place.row, place.columns] == 190).all()
        return states

    with edited_features(model, look):
        logits_of(model, inputs)
    connector = [entry for entry in seen if entry[0] == "connector"]
    assert [(image, row) for _, _, image, row, _ in connector] == [(0, 0), (1, 1), (2, 1)]
    assert torch.equal(torch.cat([states for *_, states in connector]), torch.cat(visual_features(model, inputs)))
    deep = [(number, image) for stage, number, image, _, _ in seen if stage == "deepstack"]
    assert deep == ([(n, i) for n in (0, 1) for i in (0, 1, 2)] if name == "qwen3_vl" else [])

    stock = {}
    visit_depths(model, inputs, (0, 1, 2), stock.__setitem__, final_norm=False)
    for depth in (0, 1, 2):
        seen.clear()
        with edited_states(model, depth, look):
            logits_of(model, inputs)
        assert [(stage, number, image) for stage, number, image, *_ in seen] == [("depth", depth, i) for i in range(3)]
        together = torch.cat([states for *_, states in seen])
        assert torch.allclose(together, stock[depth], atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_rows_one_by_one(name, padding, tiny_model):
    tiny = tiny_model(name)
    inputs = tiny.inputs(ROWS, padding=padding)

    def edit(states, place):
        return torch.cat([states[:1] * 0, states[1:]]) + place.number

    for managed in (lambda: edited_features(tiny.model, edit), lambda: edited_states(tiny.model, 1, edit)):
        with managed():
            together = logits_of(tiny.model, inputs)
            for row in range(len(ROWS)):
                alone = logits_of(tiny.model, tiny.single(inputs, row))
                real = inputs["attention_mask"][row].bool()
                assert torch.allclose(together[row][real], alone[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_replacing_all_visual_tokens_hides_the_pixels(name, tiny_model):
    """T3 of the specification; for DeepStack only together with the deep features (T3b)."""
    model, make = tiny_model(name)
    one = make(ROWS)
    other = {**one, "pixel_values": torch.randn_like(one["pixel_values"])}
    real = one["attention_mask"].bool()
    assert not torch.allclose(logits_of(model, one)[real], logits_of(model, other)[real], atol=1e-2)

    def zero(states, place):
        return torch.zeros_like(states)

    with edited_features(model, zero):
        assert torch.equal(logits_of(model, one)[real], logits_of(model, other)[real])
    with edited_features(model, zero, deepstack=False):
        same = torch.allclose(logits_of(model, one)[real], logits_of(model, other)[real], atol=1e-3)
        assert same == (name != "qwen3_vl")


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_edited_once_in_the_prefill(name, tiny_model):
    model, make = tiny_model(name)
    inputs, calls = make(ROWS), []

    def zero(states, place):
        calls.append(place.stage)
        return torch.zeros_like(states)

    options = {"do_sample": False, "max_new_tokens": 4}
    with edited_features(model, zero):
        edited = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert calls.count("connector") == 3
    with torch.no_grad(), edited_features(model, zero):
        expected = model(**inputs).logits[:, -1]
    assert torch.allclose(edited.logits[0], expected, atol=1e-3)
    calls.clear()
    with edited_states(model, 1, zero):
        model.generate(**inputs, **options)
    assert calls == ["depth"] * 3
    with edited_features(model, zero):  # every beam of a prompt is edited
        beams = model.generate(**inputs, **options, num_beams=2)
        other = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
        assert torch.equal(beams, model.generate(**other, **options, num_beams=2))


@pytest.mark.parametrize("name", MODELS)
def test_only_later_positions_change(name, tiny_model):
    """T6 for edits: what stands before the first edited token is untouched."""
    model, make = tiny_model(name)
    inputs = make(["tttitttt"])
    columns = (inputs["input_ids"][0] == 190).nonzero().flatten()

    shift = torch.randn(64, generator=torch.Generator().manual_seed(2)) * 5

    def edit(states, place):
        return torch.cat([states[:3], states[3:4] + shift, states[4:]])

    plain = logits_of(model, inputs)[0]
    with edited_features(model, edit):
        edited = logits_of(model, inputs)[0]
    first = int(columns[3])
    assert torch.allclose(edited[:first], plain[:first], atol=1e-5)
    assert not torch.allclose(edited[first], plain[first], atol=1e-3)
    assert not torch.allclose(edited[-1], plain[-1], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_at_a_depth_is_what_the_next_depth_reads(name, tiny_model):
    model, make = tiny_model(name)
    inputs = make(ROWS)
    target = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for depth in (0, 1, 2):
        seen = {}
        with edited_states(model, depth, lambda states, place: target.expand_as(states)):
            visit_depths(model, inputs, [depth], seen.__setitem__, final_norm=False)
        # the visitor's hook is younger than the edit's, so it sees what the block reads
        assert torch.equal(seen[depth], target.expand_as(seen[depth]))


def test_edits_of_encoded_images_leave_the_original(tiny_model):
    model, make = tiny_model("qwen3_vl")
    inputs = make(ROWS)
    with torch.no_grad():
        output = encoded_images(model, inputs)
    before = flatten_features(output.pooler_output).clone()
    places = visual_places(model, inputs, output)
    zeroed = edited_output(output, places, lambda states, place: states * 0)
    assert torch.equal(flatten_features(output.pooler_output), before)
    assert not flatten_features(zeroed.pooler_output).any()
    assert not any(flatten_features(layer).any() for layer in zeroed.deepstack_features)
    assert [len(place.columns) for place in places] == [6, 6, 4]


def test_errors_say_what_is_wrong_and_leave_no_hook(tiny_model):
    model, make = tiny_model("llava")
    inputs, before = make(ROWS), hooks_of(model)

    def shorten(states, place):
        return states[1:]

    def stop(states, place):
        raise RuntimeError("stop")

    with pytest.raises(ValueError, match="edit must return a tensor of shape"), edited_features(model, shorten):
        logits_of(model, inputs)
    with pytest.raises(ValueError, match=r"depth=7 must lie within 0\.\.2"), edited_states(model, 7, keep):
        pass
    with pytest.raises(ValueError, match="placeholders"), edited_features(model, keep):
        logits_of(model, {**inputs, "input_ids": inputs["input_ids"].clamp(max=189)})
    with pytest.raises(RuntimeError, match="stop"), edited_states(model, 1, stop):
        logits_of(model, inputs)
    assert hooks_of(model) == before
    text = make(["tttt"])
    with edited_features(model, keep), edited_states(model, 1, keep):
        assert logits_of(model, text).shape[1] == 5


def test_gradients_flow_through_an_edit(tiny_model):
    model, make = tiny_model("qwen3_vl")
    scale = torch.tensor(1.0, requires_grad=True)
    with edited_features(model, lambda states, place: states * scale):
        model(**make(["tittt"])).logits[0, -1, 7].backward()
    assert scale.grad is not None and scale.grad.abs() > 0
