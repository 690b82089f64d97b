"""Positions taken away or mixed up, in all families: exactly where asked, and nothing left behind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.where.edits.position_edits import (
    image_positions_shuffled,
    image_tokens_moved,
    image_tokens_shuffled,
    shuffled_order,
    vision_rotation_deleted,
    vision_table_deleted,
)
from dualstream.analysis.where.vision_states import learned_table
from dualstream.modeling import family_of

FAMILIES = ("llava", "llava_phi", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
ROTARY, LEARNED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("llava", "qwen3_vl", "internvl")
ROWS = ["tit", "titit", "ttitt"]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def hooks_of(model):
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def image_inputs(model, inputs):
    return {name: inputs[name] for name in family_of(model).image_input_names if name in inputs}


def with_table(tiny):
    """Give the model a table that shows; InternVL's starts at zero."""
    torch.manual_seed(1)
    torch.nn.init.normal_(learned_table(tiny.model))
    return tiny


class Recorder:
    """Cos and sin that each attention module gets, and the states that each block gets and returns."""

    def __init__(self, blocks):
        self.blocks, self.rotations, self.entered, self.left = blocks, {}, {}, {}

    def __enter__(self):
        self.handles = []
        for number, block in enumerate(self.blocks):
            attention = getattr(block, "attn", None) or getattr(block, "self_attn", None) or block.attention
            self.handles += [
                attention.register_forward_pre_hook(self._rotation(number), with_kwargs=True),
                block.register_forward_pre_hook(self._entered(number), with_kwargs=True),
                block.register_forward_hook(self._left(number)),
            ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _rotation(self, number):
        return lambda _, args, kwargs: self.rotations.update({number: kwargs.get("position_embeddings")})

    def _entered(self, number):
        return lambda _, args, kwargs: self.entered.update({number: args[0] if args else kwargs["hidden_states"]})

    def _left(self, number):
        return lambda _, args, out: self.left.update({number: out[0] if isinstance(out, tuple) else out})


@pytest.mark.parametrize("family", ROTARY)
def test_deleting_the_rotation_of_a_block_alters_that_block_only(family, tiny_model):
    model, make = tiny_model(family)
    inputs = make(ROWS)
    blocks = family_of(model).vision_blocks(model)
    with Recorder(blocks) as stock:
        logits(model, inputs)
    with vision_rotation_deleted(model, {1}), Recorder(blocks) as edited:
        logits(model, inputs)
    for block in range(len(blocks)):
        cos, sin = edited.rotations[block]
        if block == 1:
            assert bool((cos == 1).all()) and bool((sin == 0).all())
        else:
            assert torch.equal(cos, stock.rotations[block][0]) and torch.equal(sin, stock.rotations[block][1])
    assert torch.equal(edited.left[0], stock.left[0])
    assert torch.equal(edited.entered[1], stock.entered[1])
    assert not torch.allclose(edited.left[1], stock.left[1])


@pytest.mark.parametrize("family", ROTARY)
def test_one_axis_can_be_deleted(family, tiny_model):
    """Without the rotation along an axis, patches of one image that differ along it alone turn alike."""
    model, make = tiny_model(family)
    inputs = make(["it"])  # 4 x 6 patches
    blocks = family_of(model).vision_blocks(model)
    with vision_rotation_deleted(model, range(len(blocks)), axes={"w"}), Recorder(blocks) as edited:
        logits(model, inputs)
    cos = edited.rotations[0][0]
    assert len(cos.unique(dim=0)) == 4
    with Recorder(blocks) as stock:
        logits(model, inputs)
    assert len(stock.rotations[0][0].unique(dim=0)) > 4


@pytest.mark.parametrize("family", LEARNED)
def test_the_learned_table_deleted_everywhere_is_a_tower_without_it(family, new_tiny_model):
    tiny = with_table(new_tiny_model(family))
    inputs = tiny.inputs(ROWS)
    blocks = family_of(tiny.model).vision_blocks(tiny.model)
    stock = logits(tiny.model, inputs)
    with vision_table_deleted(tiny.model, range(len(blocks)), put_back=False):
        deleted = logits(tiny.model, inputs)
    assert torch.equal(logits(tiny.model, inputs), stock)
    with torch.no_grad():
        learned_table(tiny.model).zero_()
    assert torch.allclose(deleted, logits(tiny.model, inputs), atol=1e-4)
    assert not torch.allclose(deleted, stock, atol=1e-3)


@pytest.mark.parametrize("family", LEARNED)
def test_the_learned_table_leaves_one_block_and_comes_back_behind_it(family, new_tiny_model):
    model, make = with_table(new_tiny_model(family))
    inputs = make(["it"])
    blocks = family_of(model).vision_blocks(model)
    with Recorder(blocks) as stock:
        logits(model, inputs)
    with vision_table_deleted(model, {1}), Recorder(blocks) as edited:
        logits(model, inputs)
    assert torch.equal(edited.entered[0], stock.entered[0]) and torch.equal(edited.left[0], stock.left[0])
    share = stock.entered[1] - edited.entered[1]
    table = learned_table(model)
    with torch.no_grad():
        kept = table.clone()
        table.zero_()
        with Recorder(blocks) as without:
            logits(model, inputs)
        table.copy_(kept)
    assert torch.allclose(share, stock.entered[0] - without.entered[0], atol=1e-4)
    if family != "qwen3_vl":  # whose blocks need to be told where images end
        with torch.no_grad():
            inner = blocks[1](edited.entered[1], *([None] if family == "llava" else []))
        inner = inner[0] if isinstance(inner, tuple) else inner
        assert torch.allclose(edited.left[1], inner + share, atol=1e-4)


@pytest.mark.parametrize("place", ["zero", "in_place"])
@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_turn_to_one_place_and_text_stays(family, place, tiny_model, tiny_models):
    model, make = tiny_model(family)
    inputs = make(ROWS)
    blocks = family_of(model).llm_blocks(model)
    with Recorder(blocks) as stock:
        before = logits(model, inputs)
    with image_tokens_moved(model, place, {1}), Recorder(blocks) as edited:
        logits(model, inputs)
    assert torch.equal(logits(model, inputs), before)
    image = inputs["input_ids"] == tiny_models.IMAGE
    for number in (0, 1):
        for part, (own, old) in enumerate(zip(edited.rotations[number], stock.rotations[number], strict=True)):
            own, old = (x.expand(len(image), *x.shape[1:]) for x in (own, old))
            assert torch.equal(own[~image], old[~image])
            if number == 0:
                assert torch.equal(own, old)
            elif place == "zero":
                assert bool((own[image] == 1 - part).all())
    if place == "in_place":
        for row in range(len(image)):
            starts = image[row] & ~torch.nn.functional.pad(image[row], (1, 0))[:-1]
            stretch = starts.cumsum(0) * image[row]
            for number in range(1, int(stretch.max()) + 1):
                own = edited.rotations[1][0].expand(len(image), -1, -1)[row, stretch == number]
                first = stock.rotations[1][0].expand(len(image), -1, -1)[row, starts.nonzero()[number - 1, 0]]
                assert torch.equal(own, first.expand_as(own))


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_at_place_zero_have_unrotated_queries_and_keys(family, tiny_model):
    """The whole prompt moved to position 0 by hand and by the hook: a prompt of one image alone gives the same."""
    model, make = tiny_model(family)
    inputs = make(["it"])
    with image_tokens_moved(model, "zero"):
        moved = logits(model, inputs)
    assert not torch.allclose(moved, logits(model, inputs), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_orders_that_change_nothing_change_nothing(family, tiny_model):
    model, make = tiny_model(family)
    inputs = make(ROWS)
    before, hooks = logits(model, inputs), hooks_of(model)

    def same(at):
        return np.arange(len(at.columns))

    for context in (image_tokens_shuffled(model, same), image_positions_shuffled(model, same)):
        with context:
            assert torch.allclose(logits(model, inputs), before, atol=1e-5)
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_tokens_with_their_positions_are_the_same_set(family, tiny_model):
    """Contents and positions shuffled alike: in a block without causal order that is the identity on the set."""
    model, make = tiny_model(family)
    inputs = make(["it"])

    def turned(at):
        return np.arange(len(at.columns))[::-1].copy()

    with image_positions_shuffled(model, turned), Recorder(family_of(model).llm_blocks(model)) as edited:
        logits(model, inputs)
    with Recorder(family_of(model).llm_blocks(model)) as stock:
        logits(model, inputs)
    ids = inputs["input_ids"][0]
    image = (ids == family_of(model).image_token_id(model.config)).nonzero()[:, 0]
    own, old = (recorder.rotations[0][0].expand(1, -1, -1)[0] for recorder in (edited, stock))
    if family != "internvl":  # tiles of several stretches would turn one by one
        assert torch.equal(own[image], old[image.flip(0)])
    with image_tokens_shuffled(model, turned), Recorder(family_of(model).llm_blocks(model)) as edited:
        logits(model, inputs)
    assert torch.allclose(edited.entered[0][0, image], stock.entered[0][0, image.flip(0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_keeps_the_moved_keys(family, tiny_model):
    """Decoding on the cache equals one pass over prompt and answer under the same edit."""
    model, make = tiny_model(family)
    inputs = make(["titt"])
    with image_tokens_moved(model, "zero"):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        grown = dict(inputs)
        grown["input_ids"] = out[:, :-1]
        grown["attention_mask"] = torch.ones_like(out[:, :-1])
        if "mm_token_type_ids" in grown:
            tail = out.shape[1] - 1 - inputs["input_ids"].shape[1]
            grown["mm_token_type_ids"] = torch.nn.functional.pad(grown["mm_token_type_ids"], (0, tail))
        again = logits(model, grown)
    assert torch.equal(again[0, -3:].argmax(-1), out[0, -3:])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_after_an_exception(family, tiny_model):
    model, make = tiny_model(family)
    inputs = make(ROWS)
    before, hooks = logits(model, inputs), hooks_of(model)

    def fail(at):
        raise RuntimeError("inside")

    table = learned_table(model)
    address = None if table is None else table.data_ptr()
    contexts = [image_tokens_shuffled(model, fail), image_positions_shuffled(model, fail)]
    for context in contexts:
        with pytest.raises(RuntimeError, match="inside"), context:
            logits(model, inputs)
    others = [image_tokens_moved(model, "zero")]
    others += [vision_rotation_deleted(model, {0})] if family in ROTARY else []
    others += [vision_table_deleted(model, {0})] if table is not None else []
    handle = family_of(model).final_norm(model).register_forward_pre_hook(lambda *_: fail(None))
    for context in others:
        with pytest.raises(RuntimeError, match="inside"), context:
            logits(model, inputs)
    handle.remove()
    assert table is None or table.data_ptr() == address
    assert hooks_of(model) == hooks
    assert torch.equal(logits(model, inputs), before)


def test_what_a_tower_lacks_is_said(tiny_model):
    with (
        pytest.raises(ValueError, match="no learned position embeddings"),
        vision_table_deleted(tiny_model("qwen2_vl").model, {0}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no vision tower with an axial"),
        vision_rotation_deleted(tiny_model("llava").model, {0}),
    ):
        pass
    with pytest.raises(ValueError, match=r"within 0\.\.1"), image_tokens_moved(tiny_model("llava").model, "zero", {2}):
        pass
    with pytest.raises(ValueError, match="zero, in_place"), image_tokens_moved(tiny_model("llava").model, "away"):
        pass
    with (
        pytest.raises(ValueError, match="accepted are h, w"),
        vision_rotation_deleted(tiny_model("qwen2_vl").model, {0}, {"t"}),
    ):
        pass


@settings(max_examples=30, deadline=None)
@given(
    how=st.sampled_from(["global", "row", "column", "block"]),
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_shuffles_stay_within_their_groups(how, grids, seed):
    order = shuffled_order(how, grids, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(sum(rows * columns for rows, columns in grids)))
    if how == "global":
        return
    places = [
        (block, *divmod(cell, columns))
        for block, (rows, columns) in enumerate(grids)
        for cell in range(rows * columns)
    ]
    for place, source in zip(places, (places[token] for token in order), strict=True):
        assert place[0] == source[0]
        if how == "row":
            assert place[1] == source[1]
        elif how == "column":
            assert place[2] == source[2]
        else:
            assert (place[1] // 2, place[2] // 2) == (source[1] // 2, source[2] // 2)


def test_shuffles_move_tokens():
    rng = np.random.default_rng(0)
    for how in ("global", "row", "column", "block"):
        assert (shuffled_order(how, [(6, 6)], rng) != np.arange(36)).mean() > 0.4
