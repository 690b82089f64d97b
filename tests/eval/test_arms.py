"""Arms: what is written becomes what happens, on every family, in batches, with several images."""

import dataclasses
import re

import pytest
import torch

from dualstream.eval.arms import parse_arm, parse_arms
from dualstream.eval.baselines import RULES, grouped_plan
from dualstream.modeling import FAMILIES, CompressionConfig, RopeScaling, compressing, rope_scaled, run_length_plan
from dualstream.modeling.lens import image_hidden_states
from dualstream.modeling.vocabulary_scores import top_k_tokens

ROWS = ["ttittt", "ittiitt", "ttt"]
STEPS = {"max_new_tokens": 4, "do_sample": False}


class Processor:
    """All that an arm wants of a processor."""

    tokenizer = None


def run(tiny, arm, inputs, decoder):
    with arm.applied(tiny.model, Processor, decoder) as model:
        output = model.generate(**inputs, **STEPS)
        return output, getattr(model, "last_compression", None)


def test_words_become_configurations():
    assert parse_arm("none").is_off
    assert parse_arm("rle").config == CompressionConfig("rle")
    assert parse_arm("paper:rle_drop_top2").config == CompressionConfig.paper("rle_drop_top2")
    arm = parse_arm("rle_drop_top1:position_policy=compact:wrap_rows=true:min_keep=3")
    assert arm.config == CompressionConfig("rle_drop_top1", position_policy="compact", wrap_rows=True, min_keep=3)
    assert arm.planner is None
    assert str(arm) == "rle_drop_top1:position_policy=compact:wrap_rows=true:min_keep=3"
    assert parse_arm("paper:rle:seed=4").config == dataclasses.replace(CompressionConfig.paper("rle"), seed=4)
    assert parse_arm("random@rle_drop_top2").config.method == "rle_drop_top2"
    assert parse_arm("llm_map:method=rle_drop_top1").config.method == "rle_drop_top1"
    assert parse_arm("rle+poly:49:8:h").rope == RopeScaling.from_any("poly:49:8:h")
    assert parse_arm("rle+poly:49:8:h").config == CompressionConfig("rle")
    assert not parse_arm("none+sigmoid").is_off
    assert [arm.text for arm in parse_arms("rle, none,random@0.5")] == ["none", "rle", "random@0.5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rlee", "arm 'rlee' is unknown; accepted are none, rle"),
        ("", "not understood"),
        ("rle:pooling", "not understood"),
        ("rle:colour=red", "unknown options colour; accepted are pooling"),
        ("rle:pooling=median", "pooling='median' is unknown"),
        ("rle:wrap_rows=maybe", "wrap_rows='maybe' must be True or False"),
        ("none:seed=1", "is unknown"),
        ("paper:none", "is unknown"),
        ("rle@0.5", "rle takes no budget"),
        ("random", "needs a budget"),
        ("tome@none", "needs a budget"),
        ("stride@1.5", "needs a budget"),
        ("random@nan", "needs a budget"),
        ("stride@0.5:seed=1", "unknown options seed"),
        ("pool2x3", "is unknown"),
        ("llm_map:depth=deep", "must be a number"),
        ("llm_map:method=none", "method must be one of"),
        ("rle+", "not understood"),
        ("rle+cubic:3", "cubic"),
    ],
)
def test_what_is_not_understood_is_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arm(text)


@pytest.mark.parametrize("text", ["", "rle,rle", " , "])
def test_lists_of_arms_are_checked(text):
    with pytest.raises(ValueError, match="each once"):
        parse_arms(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_a_matched_budget_is_that_of_the_method_in_every_block(family, rule, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS)
    for method in ("rle", "rle_drop_top2"):
        _, expected = run(tiny, parse_arm(method), inputs, coarse_decoder)
        _, report = run(tiny, parse_arm(f"{rule}@{method}"), inputs, coarse_decoder)
        assert 0 < report.kept_tokens < report.visual_tokens
        assert torch.equal(report.plan.kept_per_block, expected.plan.kept_per_block)
        assert [i.kept_tokens for i in report.images] == [i.kept_tokens for i in expected.images]
        assert [i.row for i in report.images] == [i.row for i in expected.images]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ["random@1", "stride@1.0", "neighbours@1", "tome@1"])
def test_keeping_everything_is_the_stock_model(family, arm, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS)
    output, report = run(tiny, parse_arm(arm), inputs, coarse_decoder)
    assert report.reduction_rate == 0
    assert torch.equal(output, tiny.model.generate(**inputs, **STEPS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arm", ["random@0.4", "stride@rle", "neighbours@0.3", "tome@rle", "pool2x2", "llm_map:depth=1"]
)
def test_a_row_does_not_depend_on_its_batch(family, arm, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS)
    together, report = run(tiny, parse_arm(arm), inputs, coarse_decoder)
    for row in (0, 1):
        single = tiny.single(inputs, row)
        alone, own = run(tiny, parse_arm(arm), single, coarse_decoder)
        assert together[row, -STEPS["max_new_tokens"] :].tolist() == alone[0, -STEPS["max_new_tokens"] :].tolist()
        batch_images = [image for image in report.images if image.row == row]
        for image, same in zip(batch_images, own.images, strict=True):
            assert torch.equal(image.plan.segment, same.plan.segment)
            assert torch.equal(image.plan.anchor, same.plan.anchor)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_keep_their_positions_and_pooled_ones_are_means(family, tiny_model, coarse_decoder, reference):
    tiny = tiny_model(family)
    inputs = tiny.inputs(["titt"])
    arm = parse_arm("stride@0.5")
    with torch.no_grad(), arm.applied(tiny.model, Processor, coarse_decoder) as model:
        logits, report = model(**inputs).logits, model.last_compression
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    kept = columns[report.plan.anchor]
    output = model.model.get_image_features(
        **{name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}, return_dict=True
    )
    features = torch.cat([block.reshape(-1, block.shape[-1]) for block in output.pooler_output])
    stays = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    stays[columns] = False
    stays[kept] = True
    embeddings = model.get_input_embeddings()(inputs["input_ids"][0]).clone()
    embeddings[kept] = features[report.plan.anchor]
    sample = reference.Sample(
        embeddings[stays],
        reference._original_positions(model, inputs)[:, stays],
        stays.nonzero().flatten().tolist(),
        [i for i, c in enumerate(stays.nonzero().flatten().tolist()) if c in kept.tolist()],
        [torch.cat(list(layer))[report.plan.anchor] for layer in getattr(output, "deepstack_features", None) or []],
    )
    with torch.no_grad():
        expected = reference.sample_logits(model, sample, [])
    assert torch.allclose(logits[0], expected, atol=1e-4)


def test_pooled_windows_reach_the_language_model_as_means(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs, seen = tiny.inputs(["titt"]), []
    hook = tiny.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        _, report = run(tiny, parse_arm("pool2x2"), inputs, coarse_decoder)
    finally:
        hook.remove()
    features = tiny.model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    means = features.reshape(2, 2, 2, 2, -1).mean((1, 3)).reshape(4, -1)  # 4 x 4 cells
    assert report.kept_tokens == 4
    assert torch.allclose(seen[0][0, 3:7], means, atol=1e-5)  # <bos> t <vision start>, then the picture


def test_random_cells_depend_on_picture_and_seed(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["tit", "tit"])

    def chosen(text, inputs=inputs):
        return [tuple(i.plan.anchor.tolist()) for i in run(tiny, parse_arm(text), inputs, coarse_decoder)[1].images]

    first = chosen("random@0.5")
    assert first == chosen("random@0.5")
    assert first[0] != first[1]
    assert first != chosen("random@0.5:seed=1")
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    assert chosen("random@0.5", inputs) == first[::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_own_map_is_the_lens(family, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS)
    head, norm = FAMILIES[family].unembedding(tiny.model), FAMILIES[family].final_norm(tiny.model)
    for depth, method in ((1, "rle"), (2, "rle_drop_top2")):
        _, report = run(tiny, parse_arm(f"llm_map:depth={depth}:method={method}"), inputs, coarse_decoder)
        with torch.no_grad():
            ids = top_k_tokens(norm(image_hidden_states(tiny.model, inputs, depth)), head.weight, 2)[0]
        tables = {"meaningless": coarse_decoder.meaningless, "text_class": coarse_decoder.text_class}
        expected = run_length_plan(ids, report.grids, CompressionConfig(method), **tables)
        assert torch.equal(report.plan.segment, expected.segment)
        assert torch.equal(report.plan.anchor, expected.anchor)


def test_a_compression_named_in_the_call_wins(tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["titt"])
    with parse_arm("stride@0.5").applied(tiny.model, Processor, coarse_decoder) as model:
        model.generate(**inputs, **STEPS)
        assert model.last_compression.kept_tokens == 8
        model.generate(**inputs, compression="rle", **STEPS)
        by_name = model.last_compression
        model.generate(**inputs, compression="none", **STEPS)
        assert model.last_compression is None
    with compressing(tiny.model, "rle", coarse_decoder) as model:
        model.generate(**inputs, **STEPS)
        assert torch.equal(model.last_compression.plan.segment, by_name.plan.segment)


def test_an_arm_can_scale_the_rotary_tower_too(tiny_model, coarse_decoder):
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs(ROWS)
    stock = tiny.model(**inputs).logits
    with torch.no_grad(), parse_arm("none+poly:99:1").applied(tiny.model, Processor, coarse_decoder) as model:
        scaled = model(**inputs).logits
    with torch.no_grad(), rope_scaled(tiny.model, "poly:99:1"):
        assert torch.equal(tiny.model(**inputs).logits, scaled)
    assert not torch.allclose(scaled, stock, atol=1e-3)
    assert torch.equal(tiny.model(**inputs).logits, stock)
    without = tiny_model("llava").model
    with (
        pytest.raises(ValueError, match="rotary"),
        parse_arm("rle+poly:99:8").applied(without, Processor, coarse_decoder),
    ):
        pass
    assert type(without).__mro__[0].__name__ == "LlavaForConditionalGeneration"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: dataclasses.replace(plan, anchor=plan.anchor.flip(0)), "must ascend"),
        (lambda plan: dataclasses.replace(plan, segment=plan.segment[:-1]), "must cover 16 cells"),
        (lambda plan: dataclasses.replace(plan, kept_per_block=plan.kept_per_block - 1), "kept_per_block"),
        (lambda plan: dataclasses.replace(plan, segment=plan.segment.roll(1)), "one of their own cells"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message, tiny_model, coarse_decoder):
    tiny = tiny_model("llava")
    inputs = tiny.inputs(["titt"])
    group = torch.arange(16).div(2, rounding_mode="floor").numpy()

    def planner(images):
        return change(grouped_plan([group], images.grids.tolist()))

    with compressing(tiny.model, "rle", coarse_decoder, planner=planner) as model, pytest.raises(ValueError) as error:
        model.generate(**inputs, **STEPS)
    assert message in str(error.value)
