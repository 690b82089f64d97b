"""States of the vision tower against the connector's own view of them, for every family."""

import pytest
import torch

from dualstream.analysis.where.vision_states import (
    chosen_depths,
    feature_depth,
    patch_layout,
    truncated_vision,
    watched_vision,
)
from dualstream.modeling.families import family_of, flatten_features

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


def encoded(model, inputs):
    names = family_of(model).image_input_names
    with torch.no_grad():
        output = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs}, return_dict=True)
    return flatten_features(output.pooler_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_patch_group_changes_its_token_alone(tiny_model, family):
    """Change the four (or one) patches of a token where the connector reads them: only that feature moves."""
    model, make = tiny_model(family)
    inputs = make(["titi", "it"])
    layout, blocks = patch_layout(model, inputs), family_of(model).vision_blocks(model)
    plain, depth = encoded(model, inputs), feature_depth(model)
    assert len(plain) == sum(rows * cols for rows, cols in layout.token_grids)
    start = 0
    for block, (rows, cols) in enumerate(layout.token_grids):
        token = (3 * block + 1) % (rows * cols)
        places = layout.sequence_places(block, [token])[0]

        def spike(_, __, output, places=places):
            changed = (output[0] if isinstance(output, tuple) else output).clone()
            flat = layout.flat(changed)
            flat[places] += torch.randn(flat.shape[-1], generator=torch.Generator().manual_seed(1))
            if flat.data_ptr() != changed.data_ptr():  # flat is a copy where class tokens were cut off
                changed[:, changed.shape[1] - layout.grids[0][0] * layout.grids[0][1] :] = flat.view(
                    len(changed), -1, flat.shape[-1]
                )
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = blocks[depth - 1].register_forward_hook(spike, prepend=True)
        moved = (encoded(model, inputs) - plain).abs().amax(-1)
        handle.remove()
        assert (moved > 1e-6).nonzero().flatten().tolist() == [start + token]
        start += rows * cols


@pytest.mark.parametrize("family", FAMILIES)
def test_token_means_and_raster_order(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["i", "tit"])
    layout, seen = patch_layout(model, inputs), {}
    with watched_vision(model, [0, feature_depth(model)], lambda depth, states: seen.update({depth: states})):
        encoded(model, inputs)
    for states in seen.values():
        patches = layout.raster(states)
        tokens = layout.per_token(patches)
        place = layout.sequence_places(1, [2])[0]
        first = sum(rows * cols for rows, cols in layout.token_grids[:1])
        torch.testing.assert_close(tokens[first + 2], layout.flat(states)[place].mean(0))
        assert len(patches) == sum(rows * cols for rows, cols in layout.grids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_tower_hands_over_the_state_of_its_depth(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["it", "i"])
    blocks, plain = family_of(model).vision_blocks(model), encoded(model, inputs)
    hooks_before = [len(block._forward_hooks) for block in blocks]
    seen = {}
    with watched_vision(model, range(len(blocks) + 1), lambda depth, states: seen.setdefault(depth, states)):
        encoded(model, inputs)
    read = feature_depth(model)
    for depth in range(len(blocks) + 1):
        arrived = {}
        with (
            truncated_vision(model, depth),
            watched_vision(model, [read], lambda _, s, to=arrived: to.update(state=s)),
        ):
            features = encoded(model, inputs)
        assert torch.equal(arrived["state"], seen[min(depth, read)])
        assert torch.equal(features, plain) == (depth >= read)
    with truncated_vision(model, 0, lens=lambda state: 2 * state):
        assert not torch.equal(encoded(model, inputs), plain)
    assert [len(block._forward_hooks) for block in blocks] == hooks_before
    assert torch.equal(encoded(model, inputs), plain)


def test_nothing_is_left_behind_after_an_error(tiny_model):
    model, make = tiny_model("qwen2_vl")
    blocks = family_of(model).vision_blocks(model)
    before = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in blocks]

    def fail(*_):
        raise KeyError

    with pytest.raises(KeyError), watched_vision(model, [1], fail):
        encoded(model, make(["i"]))
    with pytest.raises(KeyError), truncated_vision(model, 1, fail):
        encoded(model, make(["i"]))
    assert [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in blocks] == before
    with pytest.raises(ValueError, match=r"0\.\.2"), truncated_vision(model, 3):
        pass
    with pytest.raises(ValueError, match="pixel_values"):
        patch_layout(model, {})


def test_depths_are_spread_with_both_ends():
    assert chosen_depths(4) == [0, 1, 2, 3, 4]
    spread = chosen_depths(32, 5)
    assert spread == [0, 8, 16, 24, 32]
