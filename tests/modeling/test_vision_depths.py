"""Vision depths against the stock model: native depth, states put in by hooks, early exit, batches, what is left."""

import pytest
import torch
from torch import nn

from dualstream.modeling.families import family_of, flatten_features
from dualstream.modeling.lens import visual_features
from dualstream.modeling.vision_depths import (
    native_vision_depth,
    scaled_features,
    uses_deepstack,
    visit_llm_depths,
    visit_vision_depths,
)

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
LLM_DEPTHS = (None, 0, 1, 2)


def read_all(model, inputs, depths, llm_depths=LLM_DEPTHS):
    """(vision depth, llm depth) -> states, and vision depth -> states of the tower."""
    states, tower = {}, {}

    def visit(depth, per_token, output):
        tower[depth] = per_token
        visit_llm_depths(model, inputs, output, llm_depths, lambda k, at: states.__setitem__((depth, k), at))

    grids, index = visit_vision_depths(model, inputs, depths, visit)
    return states, tower, grids, index


def block_states(model, inputs):
    """Independent record of the residual stream: input of the first block, output of each."""
    blocks, seen = family_of(model).vision_blocks(model), []
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    ]
    handles += [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in blocks]
    visual_features(model, inputs)
    for handle in handles:
        handle.remove()
    return [item[0] if isinstance(item, tuple) else item for item in seen]


def stock_logits_with(model, inputs, depth):
    """Logits of the whole stock model whose native vision state is replaced by the one of a depth: the slow way."""
    states = block_states(model, inputs)
    native = native_vision_depth(model)
    blocks = family_of(model).vision_blocks(model)
    handles = []
    if depth != native:
        handles.append(
            blocks[native - 1].register_forward_hook(
                lambda _, __, out: (states[depth], *out[1:]) if isinstance(out, tuple) else states[depth],
                prepend=True,  # before the stock recorder of hidden states
            )
        )
    if uses_deepstack(model):
        visual = model.model.visual
        for layer, merger in zip(visual.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True):
            if layer + 1 > depth:
                handles.append(merger.register_forward_hook(lambda _, __, out: torch.zeros_like(out)))
            else:  # the replaced state must not reach a merger that would have seen its own
                handles.append(merger.register_forward_pre_hook(lambda _, args, at=layer + 1: (states[at], *args[1:])))
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits[inputs["input_ids"] == family_of(model).image_token_id(model.config)]


def lens(model, states):
    return family_of(model).unembedding(model)(family_of(model).final_norm(model)(states))


@pytest.mark.parametrize("family", FAMILIES)
def test_native_depth_is_the_stock_model(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["tittt", "ttittit"])
    native = native_vision_depth(model)
    states, _, _, _ = read_all(model, inputs, [native])
    assert torch.equal(states[native, None], torch.cat(visual_features(model, inputs)))
    torch.testing.assert_close(
        lens(model, states[native, 2]), stock_logits_with(model, inputs, native), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_depth_is_a_full_forward_with_that_state_put_in(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["tit", "ttttit"])
    depths = range(len(family_of(model).vision_blocks(model)) + 1)
    states, _, _, _ = read_all(model, inputs, depths)
    for depth in depths:
        expected = stock_logits_with(model, inputs, depth)
        torch.testing.assert_close(lens(model, states[depth, 2]), expected, rtol=1e-4, atol=1e-4)
    different = lens(model, states[0, 2]) - lens(model, states[depths[-1], 2])
    assert different.abs().max() > 0.01  # the depths do not read the same


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_one_by_one(tiny_model, family):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["tittt", "ttitttttit"])
    depths = range(len(family_of(tiny.model).vision_blocks(tiny.model)) + 1)
    batched, tower, grids, index = read_all(tiny.model, inputs, depths)
    assert index.tolist() == sorted(index.tolist())
    singles = [read_all(tiny.model, tiny.single(inputs, row), depths) for row in (0, 1)]
    for key, states in batched.items():
        alone = torch.cat([single[0][key] for single in singles])
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)
    for depth in depths:
        assert tower[depth].shape[0] == int(grids.prod(-1).sum())
        torch.testing.assert_close(
            tower[depth], torch.cat([single[1][depth] for single in singles]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_does_not_change_what_the_image_reads(tiny_model, family):
    tiny = tiny_model(family)
    short, long = tiny.inputs(["tit"]), tiny.inputs(["tittttttt"])
    long["input_ids"][:, : short["input_ids"].shape[1]] = short["input_ids"]
    assert torch.equal(short["pixel_values"], long["pixel_values"])
    depths = range(len(family_of(tiny.model).vision_blocks(tiny.model)) + 1)
    first, second = (read_all(tiny.model, inputs, depths)[0] for inputs in (short, long))
    for key in first:
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_the_tower_are_means_over_the_patches_of_a_token(tiny_model, family):
    """The connector's order and the order of ``per_token`` agree: change one patch, one row of each changes."""
    model, make = tiny_model(family)
    inputs = make(["tit"])
    _, tower, _, _ = read_all(model, inputs, [0], [None])
    changed = {name: value.clone() for name, value in inputs.items()}
    if changed["pixel_values"].ndim == 2:
        changed["pixel_values"][5] += 1.0
    else:
        changed["pixel_values"][0, :, 9, 11] += 1.0
    states, moved, _, _ = read_all(model, changed, [0], [None])
    before = read_all(model, inputs, [0], [None])[0]
    rows = (moved[0] - tower[0]).abs().amax(-1) > 1e-5
    assert rows.sum() == 1
    assert torch.equal(rows, (states[0, None] - before[0, None]).abs().amax(-1) > 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["tit"])

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    visual_features(model, inputs)  # stock installs its own recorder on first use
    before, expected = hooks(), torch.cat(visual_features(model, inputs))

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        visit_vision_depths(model, inputs, [0, 1], fail)
    assert hooks() == before
    assert torch.equal(torch.cat(visual_features(model, inputs)), expected)


def test_stock_recorders_of_hidden_states_are_not_fed_by_the_visits(tiny_model):
    model, make = tiny_model("llava")
    inputs = make(["tit"])
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)  # recorders now sit in the language model, too
    states, _, _, _ = read_all(model, inputs, [0, 1, 2, 3])
    assert torch.equal(states[2, None], torch.cat(visual_features(model, inputs)))


def test_scaling_leaves_the_given_features_alone(tiny_model):
    model, make = tiny_model("qwen3_vl")
    inputs = make(["tit"])

    def visit(_, __, output):
        features = flatten_features(output.pooler_output).clone()
        scaled = scaled_features(output, 2.0)
        assert torch.equal(flatten_features(scaled.pooler_output), 2 * features)
        assert torch.equal(flatten_features(output.pooler_output), features)
        assert scaled.deepstack_features is not None

    visit_vision_depths(model, inputs, [1], visit)


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ([], "must name vision depths within 0..3"),
        ([4], "within 0..3"),
        ([-1], "within 0..3"),
        ([None], "within 0..3"),
    ],
)
def test_depths_out_of_range_are_refused(tiny_model, depths, message):
    model, make = tiny_model("llava")
    with pytest.raises(ValueError, match=message):
        visit_vision_depths(model, make(["tit"]), depths, lambda *_: None)


def test_text_alone_and_several_layers_at_once_are_refused(new_tiny_model):
    model, make = new_tiny_model("llava")
    with pytest.raises(ValueError, match="no pixel_values"):
        visit_vision_depths(model, make(["ttt"]), [0], lambda *_: None)
    model.config.vision_feature_layer = [-1, -2]
    with pytest.raises(ValueError, match="several depths at once"):
        native_vision_depth(model)


def test_a_tower_that_does_more_than_is_known_is_refused(new_tiny_model):
    model, make = new_tiny_model("llava")
    model.model.vision_tower.encoder.layers[1].register_forward_hook(lambda _, __, out: out)  # known: a plain block

    class Louder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features):
            return self.inner(features) * (2.0 if self.seen else 1.0)

    connector = Louder(model.model.multi_modal_projector)
    connector.seen = False
    model.model.multi_modal_projector = connector

    def visit(*_):
        connector.seen = True

    with pytest.raises(ValueError, match="differ from the stock ones"):
        visit_vision_depths(model, make(["tit"]), [2], visit)
