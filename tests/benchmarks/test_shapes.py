import pytest
import torch
from transformers import AutoModelForImageTextToText

from dualstream.benchmarks.shapes import SHAPES, build_config, build_model

TOYS = [name for name, shape in SHAPES.items() if shape.is_toy]


@pytest.mark.parametrize("name", TOYS)
def test_toy_is_built_as_the_stock_class_builds_it(name):
    model = build_model(name, layers=2, vision_layers=2, seed=3)
    config = build_config(name, layers=2, vision_layers=2)
    with torch.random.fork_rng():
        stock = AutoModelForImageTextToText.from_config(config)
    assert type(model) is type(stock)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }
    # What is not a weight (rotary frequencies, position tables) must not depend on how weights were made.
    own = dict(model.named_buffers())
    for key, buffer in stock.named_buffers():
        torch.testing.assert_close(own[key], buffer, rtol=0, atol=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_follow_the_seed_and_norms_start_at_one():
    first, again, other = (build_model("tiny", 1, 1, seed=seed) for seed in (0, 0, 1))
    head = [model.get_output_embeddings().weight for model in (first, again, other)]
    assert torch.equal(head[0], head[1]) and not torch.equal(head[0], head[2])
    assert abs(float(head[0].std()) - 0.02) < 1e-3
    assert torch.equal(first.model.language_model.norm.weight, torch.ones(128))


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in TOYS])
def test_real_shapes_are_what_the_checkpoints_are(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(name))
    published = {  # billions of parameters, as the Hub counts them
        "llava-1.5-7b": 7.06,
        "qwen2-vl-2b": 2.21,
        "qwen2.5-vl-7b": 8.29,
        "qwen3-vl-8b": 8.77,
        "internvl3-8b": 7.94,
    }
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(published[name], abs=0.01)


def test_cut_configuration_keeps_everything_but_depth():
    whole, cut = build_config("qwen2.5-vl-7b"), build_config("qwen2.5-vl-7b", layers=3, vision_layers=8)
    assert cut.get_text_config().num_hidden_layers == 3 and cut.vision_config.depth == 8
    assert cut.vision_config.fullatt_block_indexes == [7]
    assert cut.get_text_config().hidden_size == whole.get_text_config().hidden_size
    assert build_config("tiny", vocab_size=4000).get_text_config().vocab_size == 4000


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 0}, "layers=0"),
        ({"layers": 99}, "1..4"),
        ({"vision_layers": 5}, "vision_layers=5"),
        ({"vocab_size": 2000}, "vocab_size=2000"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        build_config("tiny-qwen2-vl", **options)
    with pytest.raises(ValueError, match="shape='huge' is unknown"):
        build_model("huge")
