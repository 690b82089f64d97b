import pytest
import torch

from dualstream.benchmarks.forced_map import build_decoder, forced_ids, kept_cells
from dualstream.benchmarks.prefill import compressed, feature_grids, native_short, uncompressed
from dualstream.benchmarks.shapes import SHAPES, build_model
from dualstream.benchmarks.workload import image_inputs_of, make_inputs
from dualstream.modeling import compressing, run_length_plan
from dualstream.modeling.families import family_of, flatten_features

TOYS = [name for name, shape in SHAPES.items() if shape.is_toy]
SMALL = {"tiny-qwen2-vl": (112, 168), "tiny-qwen2.5-vl": (112, 168), "tiny-qwen3-vl": (128, 192)}
RATE = 0.4


def opened(name, **options):
    model = build_model(name, layers=2, vision_layers=2)
    return model, make_inputs(model, SMALL.get(name, SHAPES[name].image_size), text_tokens=7, **options)


@pytest.mark.parametrize("name", TOYS)
def test_all_ways_reach_the_language_model_with_the_tokens_they_promise(name):
    model, inputs = opened(name, batch=2, images=2, ragged=True)
    grids = feature_grids(model, inputs)
    removed = (grids.prod(-1) - kept_cells(grids, RATE)).sum() // 2
    full = uncompressed(model, inputs)()
    assert full.length == inputs["input_ids"].shape[1]
    decoder = build_decoder("linear", model)
    for way in (native_short(model, inputs, RATE), compressed(model, inputs, RATE, decoder)):
        short = way()
        assert short.length == full.length - removed
        assert short.kv_bytes * full.length == full.kv_bytes * short.length
    assert full.kv_bytes == 2 * 2 * 2 * 2 * 32 * 4 * full.length  # layers, K and V, rows, heads, width, bytes
    assert "Compressing" not in type(model).__name__ and not hasattr(model, "last_compression")


def test_compressed_way_is_the_product_path():
    model, inputs = opened("tiny", batch=2)
    grids = feature_grids(model, inputs)

    def planner(images):
        return run_length_plan(forced_ids(images.grids, RATE)[:, None], images.grids, images.config)

    with torch.no_grad(), compressing(model, "rle", planner=planner):
        expected = model(**inputs, use_cache=True)
    found = compressed(model, inputs, RATE, build_decoder("pruned", model), grids)()
    assert torch.equal(found.first_token, expected.logits[:, -1].argmax(-1))
    for own, other in zip(found.cache.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys)


@pytest.mark.parametrize("name", ["tiny", "tiny-internvl"])
def test_limit_is_a_stock_forward_over_the_first_features(name):
    model, inputs = opened(name)
    grids, token = feature_grids(model, inputs), family_of(model).image_token_id(model.config)
    kept = kept_cells(grids, RATE).tolist()
    with torch.no_grad():
        output = model.model.get_image_features(**image_inputs_of(model, inputs), return_dict=True)
        blocks = flatten_features(output.pooler_output).split(grids.prod(-1).tolist())
        features = torch.cat([block[:number] for block, number in zip(blocks, kept, strict=True)])
        ids = inputs["input_ids"][0]
        text = ids != token
        keep = text | ((~text).cumsum(0) <= sum(kept))
        embeds = model.get_input_embeddings()(ids[keep])
        embeds[ids[keep] == token] = features
        expected = model.get_output_embeddings()(model.model.language_model(inputs_embeds=embeds[None])[0][:, -1])
    assert torch.equal(native_short(model, inputs, RATE)().first_token, expected.argmax(-1))
