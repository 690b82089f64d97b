"""Closed-form costs against published totals, counted parameters and counted FLOPs; everything on the meta device."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from dualstream.eval.decoder_costs import (
    PUBLISHED,
    cost_rows,
    decoder_cost,
    decoder_sizes,
    largest_pruned,
    llm_token_multiply_adds,
    share_of_llm_token,
)
from dualstream.modeling import VisualDecoder

PUBLISHED_PARAMETERS = {  # of the safetensors on the Hub
    "LLaVA-1.5-7B": 7_063_427_072,
    "Qwen2-VL-2B": 2_208_985_600,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen3-VL-8B": 8_767_123_696,
    "InternVL3-8B": 7_944_373_760,
}
TOKENS = 24
KINDS = (("linear", None), ("factored", None), ("pruned", 57))
sizes = st.tuples(st.integers(60, 400), st.integers(1, 48))


@functools.cache
def meta_model(name: str, blocks: int | None = None):
    config = PUBLISHED[name]()
    text = config.get_text_config()
    if blocks is not None:
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model


def flops(function) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_have_the_published_number_of_parameters(name):
    assert sum(parameter.numel() for parameter in meta_model(name).parameters()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_llm_token_costs_its_weights_and_its_attention(name):
    """The blocks' matrices are applied once per token; attention is what the FLOP counter finds beyond them."""
    model = meta_model(name, blocks=2).model.language_model
    weights = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert llm_token_multiply_adds(model.config, 0) == weights
    model.set_attn_implementation("eager")
    states = torch.empty(1, TOKENS, model.config.hidden_size, device="meta")
    mask = torch.empty(1, 1, TOKENS, TOKENS, device="meta")
    counts = flops(lambda: model(inputs_embeds=states, attention_mask=mask, use_cache=False)).get_flop_counts()
    of_blocks = [sum(counts[key].values()) for key in counts if key.split(".")[-2:-1] == ["layers"]]
    assert len(of_blocks) == 2
    assert sum(of_blocks) == 2 * TOKENS * llm_token_multiply_adds(model.config, TOKENS)


@pytest.mark.parametrize("family", ["llava", "llava_phi", "qwen2_vl", "qwen3_vl", "internvl"])
def test_tiny_models_of_every_family_agree_too(tiny_model, family):
    model = tiny_model(family).model
    weights = sum(m.weight.numel() for m in model.model.language_model.layers.modules() if hasattr(m, "in_features"))
    assert llm_token_multiply_adds(model.config, 0) == weights
    assert decoder_sizes(model.config) == tuple(model.get_output_embeddings().weight.shape)


@given(sizes, st.sampled_from(KINDS))
def test_decoder_costs_equal_the_module_and_its_counted_flops(shape, kind_and_classes):
    kind, classes = kind_and_classes
    with torch.device("meta"):
        decoder = VisualDecoder(*shape, kind=kind, num_classes=classes).bfloat16()
        features, unembedding = torch.empty(TOKENS, shape[1]).bfloat16(), torch.empty(*shape).bfloat16()
    cost = decoder_cost(kind, *shape, classes)
    assert cost.num_classes == decoder.num_classes
    assert cost.parameters == sum(p.numel() for p in decoder.parameters()) == decoder.num_own_parameters
    assert cost.bytes == sum(p.numel() * p.element_size() for p in decoder.parameters())
    assert cost.table_bytes == sum(b.numel() * b.element_size() for b in decoder.buffers())
    assert cost.multiply_adds == decoder.multiply_adds
    counted = flops(lambda: decoder(features, unembedding=unembedding)).get_total_flops()
    assert counted == 2 * TOKENS * cost.multiply_adds


def test_reading_the_best_costs_no_more_matrix_products_than_scoring():
    """``top_k`` walks over slices of the vocabulary; together they are the one product."""
    unembedding, features = torch.randn(300, 16), torch.randn(TOKENS, 16)
    for kind, classes in KINDS:
        decoder = VisualDecoder(300, 16, kind=kind, num_classes=classes)
        counted = flops(lambda d=decoder: d.top_k(features, 2, unembedding=unembedding, chunk_size=64))
        assert counted.get_total_flops() == 2 * TOKENS * decoder_cost(kind, 300, 16, classes).multiply_adds


@pytest.mark.parametrize("name", PUBLISHED)
def test_factored_saves_memory_and_costs_time(name):
    rows = {row["kind"]: row for row in cost_rows(PUBLISHED[name]())}
    assert rows["factored"]["bytes"] < rows["linear"]["bytes"] / 7
    assert rows["factored"]["multiply_adds"] > rows["linear"]["multiply_adds"]
    assert rows["unembedding"]["parameters"] == 0
    assert rows["unembedding"]["multiply_adds"] == rows["linear"]["multiply_adds"]


@pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "Qwen2.5-VL-7B"])
def test_only_a_pruned_decoder_meets_both_budgets(name):
    """1 % of an LLM token and 50 MB; the number of classes printed is the largest: one more breaks a budget."""
    config = PUBLISHED[name]()
    classes = largest_pruned(config)
    rows = {row["kind"]: row for row in cost_rows(config, context_length=0)}
    fits = {kind: row["share_of_llm_token"] <= 0.01 and row["megabytes"] <= 50 for kind, row in rows.items()}
    assert fits == {"unembedding": False, "linear": False, "factored": False, "pruned": True}
    assert rows["factored"]["megabytes"] <= 50, "factored meets the budget of memory, not that of time"
    assert classes == rows["pruned"]["num_classes"]
    assert decoder_cost("pruned", *decoder_sizes(config), classes + 1).megabytes > 50
    by_time = largest_pruned(config, megabytes=1e9)
    one_more = decoder_cost("pruned", *decoder_sizes(config), by_time + 1)
    assert (
        share_of_llm_token(one_more, config, 0)
        > 0.01
        >= share_of_llm_token(decoder_cost("pruned", *decoder_sizes(config), by_time), config, 0)
    )


def test_a_longer_prompt_makes_the_share_smaller_in_proportion_to_attention():
    config = PUBLISHED["LLaVA-1.5-7B"]()
    none, some = llm_token_multiply_adds(config, 0), llm_token_multiply_adds(config, 1000)
    assert some - none == 32 * 2 * 4096 * 1000
    cost = decoder_cost("linear", *decoder_sizes(config))
    assert share_of_llm_token(cost, config, 1000) < share_of_llm_token(cost, config, 0)


def test_a_budget_nothing_fits_gives_no_classes():
    assert largest_pruned(PUBLISHED["LLaVA-1.5-7B"](), megabytes=0.1) == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="kind='dense' is unknown; choose one of unembedding, linear"):
        decoder_cost("dense", 10, 4)
    with pytest.raises(ValueError, match="num_classes=None with kind='pruned'"):
        decoder_cost("pruned", 10, 4)
    with pytest.raises(ValueError, match="num_classes=3 with kind='linear'"):
        decoder_cost("linear", 10, 4, 3)
    with pytest.raises(ValueError, match="context_length must be at least 0, got -1"):
        llm_token_multiply_adds(PUBLISHED["LLaVA-1.5-7B"](), -1)
