"""The equality matrix: compressed generation against a per-sample, unpadded, cache-free reference."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.modeling.compression_context import compressing
from dualstream.modeling.families import FAMILIES
from dualstream.modeling.visual_compression import CompressionConfig

STEPS = 4
TOLERANCE = 5e-6
ROWS = {
    "one": ["ttittt"],
    "ragged": ["ttittt", "titittttt", "itt"],
    "text_row": ["ttittt", "titittttt", "itt", "tttttttt"],
}
MODES = {
    "default": {},
    "no_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 5},
}


@pytest.fixture(scope="session")
def expected(tiny_model, reference, coarse_decoder):
    """Function (family, batch, options, policy) -> (tiny, inputs, tokens per row, (rows, steps, V) logits)."""

    @functools.cache
    def get(family, batch, policy, options):
        tiny = tiny_model(family)
        inputs = tiny.inputs(ROWS[batch])
        tables = {"meaningless": coarse_decoder.meaningless.tolist()}
        tokens, logits = [], []
        for row in range(len(ROWS[batch])):
            with torch.no_grad():
                sample = reference.compress_sample(
                    tiny.model,
                    tiny.single(inputs, row),
                    coarse_decoder.weight,
                    {**dict(options), **tables},
                    policy == "compact",
                )
            row_tokens, row_logits = reference.greedy(tiny.model, sample, STEPS)
            tokens.append(row_tokens)
            logits.append(row_logits)
        return tiny, inputs, torch.tensor(tokens), torch.stack(logits)

    return lambda family, batch, policy="original", **options: get(
        family, batch, policy, tuple(sorted({"method": "rle", **options}.items()))
    )


def run(tiny, inputs, decoder, config=None, **options):
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    config = config or CompressionConfig(method="rle")
    with compressing(tiny.model, config=config, decoder=decoder) as model:
        output = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
        return output, model.last_compression


def check(output, inputs, tokens, logits):
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(output.sequences[:, length:], tokens)
    assert (torch.stack(output.logits, dim=1) - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", ROWS)
@pytest.mark.parametrize("family", [*FAMILIES, "llava_phi"])
def test_greedy_equals_reference(family, batch, mode, expected, coarse_decoder):
    tiny, inputs, tokens, logits = expected(family, batch)
    output, report = run(tiny, inputs, coarse_decoder, **MODES[mode])
    assert report.kept_tokens < report.visual_tokens, "the case must compress something"
    check(output, inputs, tokens, logits)


@pytest.mark.parametrize("mode", ["default", "no_cache", "static", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_attention_mask(family, mode, expected, coarse_decoder):
    tiny, inputs, tokens, logits = expected(family, "one")
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    check(run(tiny, bare, coarse_decoder, **MODES[mode])[0], inputs, tokens, logits)


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "rle_drop_top1"},
        {"method": "rle_drop_top2", "drop_scope": "first", "wrap_rows": True},
        {"method": "rle", "pooling": "first"},
        {"method": "rle", "wrap_rows": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_equal_reference(family, options, policy, expected, coarse_decoder):
    tiny, inputs, tokens, logits = expected(family, "ragged", policy, **options)
    config = CompressionConfig(position_policy=policy, **options)
    check(run(tiny, inputs, coarse_decoder, config)[0], inputs, tokens, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_is_healed(family, expected, coarse_decoder):
    tiny, _, tokens, logits = expected(family, "ragged")
    inputs = tiny.inputs(ROWS["ragged"], padding="right")
    check(run(tiny, inputs, coarse_decoder)[0], inputs, tokens, logits)


@st.composite
def random_batches(draw):
    row = st.text("ti", max_size=6).filter(lambda text: text.count("i") <= 2).map(lambda text: text + "t")
    rows = draw(st.lists(row, min_size=1, max_size=4).filter(lambda rows: any("i" in row for row in rows)))
    options = {
        "method": draw(st.sampled_from(["rle", "rle_drop_top1", "rle_drop_top2"])),
        "pooling": draw(st.sampled_from(["mean", "first"])),
        "wrap_rows": draw(st.booleans()),
        "drop_scope": draw(st.sampled_from(["run", "first"])),
        "min_keep": draw(st.integers(0, 3)),
    }
    return rows, draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 99)), options, draw(st.booleans())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(case=random_batches())
def test_any_batch_equals_reference(family, case, tiny_model, reference, coarse_decoder):
    rows, padding, seed, options, compact = case
    tiny = tiny_model(family)
    inputs = tiny.inputs(rows, padding=padding, seed=seed)
    config = CompressionConfig(**options, position_policy="compact" if compact else "original")
    output, _ = run(tiny, inputs, coarse_decoder, config, max_new_tokens=2)
    for row in range(len(rows)):
        with torch.no_grad():
            single = tiny.single(inputs, row)
            tables = {"meaningless": coarse_decoder.meaningless.tolist()}
            sample = reference.compress_sample(
                tiny.model, single, coarse_decoder.weight, {**options, **tables}, compact
            )
        tokens, logits = reference.greedy(tiny.model, sample, 2)
        assert output.sequences[row, -2:].tolist() == tokens
        assert (torch.stack(output.logits, dim=1)[row] - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention(family, new_tiny_model, expected, coarse_decoder):
    _, inputs, tokens, logits = expected(family, "text_row")
    tiny = new_tiny_model(family)
    tiny.model.set_attn_implementation("eager")
    check(run(tiny, inputs, coarse_decoder)[0], inputs, tokens, logits)


@pytest.mark.parametrize("returned", [1, 2])
@pytest.mark.parametrize("batch", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_equal_per_sample_beams(family, batch, returned, tiny_model, reference, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS[batch])
    beams = {"num_beams": 2, "num_return_sequences": returned, "output_scores": True, "max_new_tokens": 3}
    output, _ = run(tiny, inputs, coarse_decoder, **beams)
    length = inputs["input_ids"].shape[1]
    for row in range(len(ROWS[batch])):
        with torch.no_grad():
            sample = reference.compress_sample(
                tiny.model, tiny.single(inputs, row), coarse_decoder.weight, {"method": "rle"}, False
            )
        for rank, (score, tokens) in enumerate(reference.beam_search(tiny.model, sample, 3, 2)[:returned]):
            sequence = output.sequences[row * returned + rank]
            assert torch.equal(sequence[:length], inputs["input_ids"][row])
            assert sequence[length:].tolist() == tokens
            assert output.sequences_scores[row * returned + rank] == pytest.approx(score / 3, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_singles(family, tiny_model, coarse_decoder):
    tiny = tiny_model(family)
    inputs = tiny.inputs(ROWS["text_row"])
    config = CompressionConfig(method="rle", pooling="random", seed=3)
    batch = run(tiny, inputs, coarse_decoder, config)[0].logits
    for row in range(len(ROWS["text_row"])):
        single = tiny.single(inputs, row)
        alone = run(tiny, single, coarse_decoder, config)[0].logits
        for together, apart in zip(batch, alone, strict=True):
            assert (together[row] - apart[0]).abs().max() <= TOLERANCE
