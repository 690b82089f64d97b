"""Reading several depths in one pass equals reading each by itself, and leaves no trace."""

import pytest
import torch

from dualstream.modeling.families import FAMILIES, family_of
from dualstream.modeling.lens import image_hidden_states, read_visual_tokens, visual_features
from dualstream.modeling.lens_depths import read_depths, read_states, visit_depths
from dualstream.modeling.visual_decoder import VisualDecoder

MODELS = [*FAMILIES, "llava_phi"]
ROWS = ["ttitttt", "titittttt", "tttt"]
DEPTHS = (1, None, 2, 0)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_reading_per_depth(name, final_norm, tiny_model):
    tiny = tiny_model(name)
    inputs = tiny.inputs(ROWS)
    together = read_depths(tiny.model, inputs, DEPTHS, final_norm=final_norm, top_k=3)
    assert list(together) == list(DEPTHS)
    for depth, reading in together.items():
        alone = read_visual_tokens(tiny.model, inputs, depth=depth, final_norm=final_norm, top_k=3)
        assert torch.equal(reading.ids, alone.ids)
        assert torch.allclose(reading.scores, alone.scores, atol=1e-5)
        assert torch.equal(reading.grids, alone.grids)
        assert torch.equal(reading.image_index, alone.image_index)


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_lens_in_ascending_order(name, tiny_model):
    tiny = tiny_model(name)
    inputs, seen = tiny.inputs(ROWS), {}
    visit_depths(tiny.model, inputs, DEPTHS, seen.__setitem__, final_norm=False)
    assert list(seen) == [None, 0, 1, 2]
    assert torch.equal(seen[None], torch.cat(visual_features(tiny.model, inputs)))
    for depth in (0, 1, 2):
        assert torch.allclose(seen[depth], image_hidden_states(tiny.model, inputs, depth), atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_one_encoding_only_needed_blocks_and_no_trace(name, tiny_model):
    tiny = tiny_model(name)
    model, inputs, family, ran = tiny.model, tiny.inputs(ROWS), family_of(tiny.model), []
    blocks, norm = family.llm_blocks(model), family.final_norm(model)
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in [("tower", family.vision_tower(model)), *enumerate(blocks)]
    ]
    deltas = getattr(model.model, "rope_deltas", None)
    for depths, expected in (((None,), []), ((0, None), []), ((1, 0), [0]), ((None, 2, 0), [0, 1])):
        ran.clear()
        read_depths(model, inputs, depths)
        assert ran == ["tower", *expected]
        assert getattr(model.model, "rope_deltas", None) is deltas
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in [*blocks, norm])


def test_an_error_of_the_visitor_passes_and_leaves_no_hook(tiny_model):
    tiny = tiny_model("qwen2_vl")
    family = family_of(tiny.model)

    def fail(depth, states):
        if depth == 1:
            raise KeyError("visitor")

    with pytest.raises(KeyError, match="visitor"):
        visit_depths(tiny.model, tiny.inputs(ROWS), (None, 1, 2), fail)
    modules = [*family.llm_blocks(tiny.model), family.final_norm(tiny.model)]
    assert not any(module._forward_pre_hooks for module in modules)


def test_a_decoder_reads_the_connector_and_nothing_else(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(ROWS)
    with_decoder = read_depths(tiny.model, inputs, (None, 0, 2), final_norm=False, decoder=coarse_decoder)
    plain = read_depths(tiny.model, inputs, (None, 0, 2), final_norm=False)
    features = torch.cat(visual_features(tiny.model, inputs))
    assert torch.equal(with_decoder[None].ids, coarse_decoder.top_k(features, 1))
    assert not torch.equal(with_decoder[None].ids, plain[None].ids)
    for depth in (0, 2):
        assert torch.equal(with_decoder[depth].ids, plain[depth].ids)
    with pytest.raises(ValueError, match="belongs to another model"):
        read_states(tiny.model, features, None, decoder=VisualDecoder(10, 64))


def test_errors(tiny_model):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["titt"])
    for depths in ((), (3,), (None, -1)):
        with pytest.raises(ValueError, match=r"must name at least one depth, each None .* within 0..2"):
            read_depths(tiny.model, inputs, depths)
    with pytest.raises(ValueError, match="holds no pixel_values"):
        read_depths(tiny.model, tiny.inputs(["tt"]), (None,))
