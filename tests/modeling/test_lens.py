"""Reading visual tokens: early exit equals the whole forward pass, and leaves no trace."""

import pytest
import torch

from dualstream.modeling.compression_context import compressing
from dualstream.modeling.families import FAMILIES, family_of
from dualstream.modeling.lens import (
    image_features_and_states,
    image_hidden_states,
    read_visual_tokens,
    visual_features,
)
from dualstream.modeling.visual_decoder import VisualDecoder

MODELS = [*FAMILIES, "llava_phi"]
ROWS = ["ttitttt", "titittttt", "tttt"]


def image_rows(model, inputs, values):
    return values[inputs["input_ids"] == model.config.image_token_id]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_last_depth_with_norm_is_the_models_own_prediction(name, padding, tiny_model):
    tiny = tiny_model(name)
    inputs = tiny.inputs(ROWS, padding=padding)
    reading = read_visual_tokens(tiny.model, inputs, depth=2, top_k=3)
    with torch.no_grad():
        logits = image_rows(tiny.model, inputs, tiny.model(**inputs).logits)
    expected = logits.log_softmax(-1).topk(3)
    assert torch.equal(reading.ids[:, 0], logits.argmax(-1))
    assert torch.equal(reading.ids, expected.indices)
    assert torch.allclose(reading.scores, expected.values, atol=1e-5)
    assert int(reading.grids.prod(-1).sum()) == len(reading.ids)
    assert len(reading.image_index) == len(reading.grids)


@pytest.mark.parametrize("name", MODELS)
def test_every_depth_equals_the_hidden_state_there(name, tiny_model):
    tiny = tiny_model(name)
    inputs, family = tiny.inputs(ROWS), family_of(tiny.model)
    with torch.no_grad():
        states = tiny.model(**inputs, output_hidden_states=True).hidden_states
    features = torch.cat(visual_features(tiny.model, inputs))
    assert torch.allclose(image_hidden_states(tiny.model, inputs, 0), features, atol=1e-6)
    for depth in (0, 1):  # the last of `states` is already normed
        ours = image_hidden_states(tiny.model, inputs, depth)
        expected = image_rows(tiny.model, inputs, states[depth])
        if depth and name == "qwen3_vl":  # transformers records block outputs before the deepstack features are added
            grid = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
            with torch.no_grad():
                expected = expected + torch.cat(
                    tiny.model.model.get_image_features(**grid).deepstack_features[depth - 1]
                )
        assert torch.allclose(ours, expected, atol=1e-5)
        plain = read_visual_tokens(tiny.model, inputs, depth=depth, final_norm=False)
        assert torch.equal(plain.ids[:, 0], tiny.model.lm_head(ours).argmax(-1))
        normed = read_visual_tokens(tiny.model, inputs, depth=depth)
        assert torch.equal(normed.ids[:, 0], tiny.model.lm_head(family.final_norm(tiny.model)(ours)).argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_features_and_states_come_from_one_pass_of_the_encoder(name, tiny_model):
    tiny = tiny_model(name)
    model, inputs, encoded, ran = tiny.model, tiny.inputs(ROWS), [], []
    family = family_of(model)
    towers = {family.vision_tower(model): encoded, **dict.fromkeys(family.llm_blocks(model), ran)}
    handles = [
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for module, calls in towers.items()
    ]
    for depth in (0, 1, 2):
        encoded.clear(), ran.clear()
        features, states, grids = image_features_and_states(model, inputs, depth)
        assert (len(encoded), len(ran)) == (1, depth)
        assert not features.requires_grad and not states.requires_grad
        assert torch.equal(features, torch.cat(visual_features(model, inputs)))
        assert torch.equal(states, image_hidden_states(model, inputs, depth))
        assert torch.equal(grids, read_visual_tokens(model, inputs).grids)
    for handle in handles:
        handle.remove()
    normed = family.final_norm(model)(states)
    with torch.no_grad():
        logits = image_rows(model, inputs, model(**inputs).logits)
    assert torch.allclose(model.lm_head(normed), logits, atol=1e-5)
    with pytest.raises(ValueError, match=r"depth=3 must lie within 0\.\.2"):
        image_features_and_states(model, inputs, 3)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_asked_blocks_run_and_nothing_stays(name, tiny_model):
    tiny = tiny_model(name)
    model, inputs, ran = tiny.model, tiny.inputs(ROWS), []
    blocks = family_of(model).llm_blocks(model)
    handles = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, block in enumerate(blocks)
    ]
    with torch.no_grad():
        before = model(**inputs).logits
        deltas = getattr(model.model, "rope_deltas", None)
        for depth in (None, 0, 1, 2):
            ran.clear()
            read_visual_tokens(model, inputs, depth=depth)
            assert ran == list(range(depth or 0))
        assert getattr(model.model, "rope_deltas", None) is deltas
        assert torch.equal(model(**inputs).logits, before)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in [*blocks, family_of(model).final_norm(model)])


@pytest.mark.parametrize("name", MODELS)
def test_reading_does_not_depend_on_text_after_the_image(name, tiny_model):
    tiny = tiny_model(name)
    inputs = tiny.inputs(["titttt"])
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, -3:] = 17
    longer = tiny.inputs(["tittttttttt"])
    longer["input_ids"][:, : inputs["input_ids"].shape[1] - 4] = inputs["input_ids"][:, :-4]
    for depth in (None, 0, 1, 2):
        reading = read_visual_tokens(tiny.model, inputs, depth=depth)
        for prompt in (other, longer):
            same = read_visual_tokens(tiny.model, {**prompt, "pixel_values": inputs["pixel_values"]}, depth=depth)
            assert torch.equal(same.ids, reading.ids)
            assert torch.allclose(same.scores, reading.scores, atol=1e-6)


def test_decoders(tiny_model, new_tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(ROWS)
    features = torch.cat(visual_features(tiny.model, inputs))
    plain = read_visual_tokens(tiny.model, inputs)
    assert torch.equal(plain.ids[:, 0], tiny.model.lm_head(features).argmax(-1))
    coarse = read_visual_tokens(tiny.model, inputs, decoder=coarse_decoder, top_k=2)
    assert torch.equal(coarse.ids, coarse_decoder.top_k(features, 2))
    owner = new_tiny_model("llava")
    owner.model.visual_decoder = coarse_decoder
    assert torch.equal(read_visual_tokens(owner.model, inputs, top_k=2).ids, coarse.ids)
    assert not torch.equal(read_visual_tokens(owner.model, inputs, depth=0, final_norm=False).ids, coarse.ids[:, :1])
    with pytest.raises(ValueError, match="belongs to another model"):
        read_visual_tokens(tiny.model, inputs, decoder=VisualDecoder(10, 64))


def test_inside_compressing_and_with_a_processors_compression_key(tiny_model, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(ROWS)
    outside = read_visual_tokens(tiny.model, inputs, depth=1)
    with compressing(tiny.model, decoder=coarse_decoder) as model:
        inside = read_visual_tokens(model, {**inputs, "compression": "rle"}, depth=1)
    assert torch.equal(inside.ids, outside.ids)


def test_video_beside_images(tiny_model):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(["tvitt"])
    with torch.no_grad():
        logits = image_rows(tiny.model, inputs, tiny.model(**inputs).logits)
    assert torch.equal(read_visual_tokens(tiny.model, inputs, depth=2).ids[:, 0], logits.argmax(-1))


def test_errors(tiny_model):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["titt"])
    for depth in (-1, 3):
        with pytest.raises(ValueError, match=rf"depth={depth} must lie within 0..2"):
            read_visual_tokens(tiny.model, inputs, depth=depth)
    with pytest.raises(ValueError, match="holds no pixel_values"):
        read_visual_tokens(tiny.model, tiny.inputs(["tt"]))
    with pytest.raises(ValueError, match="holds no input_ids"):
        read_visual_tokens(tiny.model, {"pixel_values": inputs["pixel_values"]}, depth=0)
    assert len(read_visual_tokens(tiny.model, {"pixel_values": inputs["pixel_values"]}).ids) == 16
