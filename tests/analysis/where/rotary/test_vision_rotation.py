"""The rotary attention of real towers: queries, keys, positions, and rotations replaced block by block."""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from dualstream.analysis.where.rotary.rotary_algebra import rotated
from dualstream.analysis.where.rotary.vision_rotation import (
    image_of_patch,
    queries_and_keys,
    raster_places,
    rotation_replaced,
    tower_positions,
    vision_rotary,
)
from dualstream.modeling import apply_rope_scaling, family_of, rope_scaled
from dualstream.processing.patch_order import inverse, merge_block_order, window_order

ROTARY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral")


@pytest.fixture(scope="module")
def pixtral(tiny_models):
    """LLaVA with a Pixtral tower."""
    torch.manual_seed(0)
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
    )
    text = LlamaConfig(**tiny_models.TEXT)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tiny_models.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def model_and_images(tiny_model, pixtral):
    """Function family -> (model, image inputs of three images of different shapes)."""

    def get(family):
        if family == "pixtral":
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(2, 3, 48, 64, generator=generator)
            return pixtral, {"pixel_values": pixels, "image_sizes": torch.tensor([[48, 32], [24, 64]])}
        model, inputs = tiny_model(family)
        made = inputs(["itit", "it"])
        return model, {name: made[name] for name in family_of(model).image_input_names if name in made}

    return get


@torch.no_grad()
def features(model, images):
    """Everything the tower hands on."""
    output = model.model.get_image_features(**images, return_dict=True)
    deep = getattr(output, "deepstack_features", None) or []
    return torch.cat([torch.cat(list(part)) for part in (output.pooler_output, *deep)], dim=-1)


def hooks_of(model):
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


@pytest.mark.parametrize("family", ROTARY)
def test_the_stock_rotation_is_stock_bit_for_bit(family, model_and_images):
    model, images = model_and_images(family)
    rotary = vision_rotary(model)
    before = features(model, images)
    with rotation_replaced(rotary, rotary.stock_rotation):
        assert torch.equal(features(model, images), before)
    assert torch.equal(features(model, images), before)


@pytest.mark.parametrize("family", ROTARY)
def test_hooks_leave_no_trace_after_an_exception(family, model_and_images):
    model, images = model_and_images(family)
    before, hooks = features(model, images), hooks_of(model)

    def fail(*_):
        raise RuntimeError("inside")

    for context in (rotation_replaced(vision_rotary(model), fail), queries_and_keys(vision_rotary(model), fail)):
        with pytest.raises(RuntimeError, match="inside"), context:
            features(model, images)
    assert torch.equal(features(model, images), before)
    assert hooks_of(model) == hooks


def test_queries_and_keys_give_eager_attention(model_and_images):
    """Differences of rotated products are the differences of the log-probabilities that Pixtral hands out."""
    model, images = model_and_images("pixtral")
    rotary, seen, weights = vision_rotary(model), {}, {}

    def visit(block, queries, keys, sides):
        cos, sin = (side[:, None] for side in sides)
        products = torch.einsum("nhd,mhd->hnm", rotated(queries, cos, sin), rotated(keys, cos, sin))
        seen[block] = rotary.attentions[block].scaling * products

    def keep(block):
        return lambda module, args, output: weights.update({block: output[1][0]})

    tower = family_of(model).vision_tower(model)
    stock = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    handles = [module.register_forward_hook(keep(block)) for block, module in enumerate(rotary.attentions)]
    try:
        with queries_and_keys(rotary, visit):
            features(model, images)
    finally:
        tower.set_attn_implementation(stock)
        for handle in handles:
            handle.remove()
    assert sorted(seen) == list(range(len(rotary.attentions)))
    for block, products in seen.items():
        log = weights[block].log()
        own, expected = (x - x.diagonal(dim1=-2, dim2=-1)[..., None] for x in (products, log))
        assert torch.allclose(own[torch.isfinite(log)], expected[torch.isfinite(log)], atol=1e-4)


@pytest.mark.parametrize("family", ROTARY[:3])
def test_the_output_of_every_block_follows_from_queries_and_keys(family, model_and_images):
    """Attention computed from the captured products, per image, is what the block's attention returns."""
    model, images = model_and_images(family)
    rotary = vision_rotary(model)
    made, returned, keep = {}, {}, []
    windows = getattr(family_of(model).vision_tower(model), "fullatt_block_indexes", None)

    def visit(block, queries, keys, sides):
        cos, sin = (side[:, None] for side in sides)
        made[block] = torch.einsum("nhd,mhd->hnm", rotated(queries, cos, sin), rotated(keys, cos, sin))

    values = {}

    def keep_values(attention, args, kwargs, output, block):
        hidden = args[0]
        values[block] = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1)[:, 2]
        returned[block] = output

    handles = [
        module.register_forward_hook(lambda *a, block=block: keep_values(*a, block), with_kwargs=True)
        for block, module in enumerate(rotary.attentions)
    ]
    try:
        with tower_positions(rotary, keep), queries_and_keys(rotary, visit):
            features(model, images)
    finally:
        for handle in handles:
            handle.remove()
    same = image_of_patch(keep[0])
    for block, attention in enumerate(rotary.attentions):
        group = same
        if windows is not None and block not in windows:
            place = keep[0].long() // 4  # windows of 32 pixels are 4 patches wide
            group = same * 10_000 + place[:, 0] * 100 + place[:, 1]
        logits = (made[block] * attention.scaling).masked_fill(group[:, None] != group[None], -torch.inf)
        mixed = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), values[block])
        assert torch.allclose(attention.proj(mixed.flatten(1)), returned[block], atol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
def test_places_are_those_of_the_processors_order(family, model_and_images):
    model, images = model_and_images(family)
    keep = []
    with tower_positions(vision_rotary(model), keep):
        features(model, images)
    places, start = raster_places(keep[0]), 0
    if family == "pixtral":
        shapes = [(6, 4), (3, 8)]
    else:
        shapes = [tuple(grid[1:]) for grid in images["image_grid_thw"].tolist()]
    assert [tuple(grid.shape) for grid in places] == shapes
    for grid, (rows, columns) in zip(places, shapes, strict=True):
        order = torch.arange(rows * columns)
        if family == "qwen2_5_vl":
            order = torch.from_numpy(inverse(window_order(rows, columns, 2, 4)))
        elif family != "pixtral":
            order = torch.from_numpy(inverse(merge_block_order(rows, columns, 2)))
        assert torch.equal(grid.flatten(), order + start)
        start += rows * columns


@pytest.mark.parametrize("family", ROTARY)
def test_frequencies_in_use_follow_a_scaling(family, model_and_images):
    model, images = model_and_images(family)
    stock = vision_rotary(model).frequencies
    before = features(model, images)
    with rope_scaled(model, "poly:9:2:w"):
        rotary = vision_rotary(model)
        width = rotary.axes.index("w")
        assert torch.equal(rotary.frequencies[1 - width], stock[1 - width])
        assert rotary.frequencies[width].sum() > stock[width].sum()
        scaled = features(model, images)
        with rotation_replaced(rotary, rotary.stock_rotation):
            assert torch.equal(features(model, images), scaled)
    assert not torch.equal(scaled, before)


def test_a_learned_table_is_followed(new_tiny_model):
    tiny = new_tiny_model("qwen2_vl")
    stock = vision_rotary(tiny.model).frequencies
    apply_rope_scaling(tiny.model, "table:9:2")
    assert torch.allclose(vision_rotary(tiny.model).frequencies[:, -1], stock[:, -1] * (1 + 9 * 0.5**2), rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_tower_without_rotary_positions_is_an_error(family, tiny_model):
    with pytest.raises(ValueError, match="no vision tower with an axial rotary table"):
        vision_rotary(tiny_model(family).model)
