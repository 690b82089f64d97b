"""Predicted bytes against measured ones, and largest batches against their definition."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualstream.benchmarks import memory
from dualstream.benchmarks.forced_map import build_decoder
from dualstream.benchmarks.memory import Bytes
from dualstream.benchmarks.prefill import compressed, first_token, uncompressed
from dualstream.benchmarks.shapes import SHAPES, build_model
from dualstream.benchmarks.workload import make_inputs

TOYS = [name for name in SHAPES if name.startswith("tiny")]
TOLERANCE = 0.05  # toy widths: numbers that no formula mentions weigh more than at real ones


@functools.cache
def toy(name, dtype=torch.bfloat16):
    return build_model(name, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TOYS)
def test_peaks_are_predicted(name, dtype):
    rows = memory.check(toy(name, dtype), SHAPES[name].image_size, text_tokens=40, decoders=("pruned", "linear"))
    assert {row["batch"] for row in rows} == {1, 2}
    assert all(abs(row["error"]) < TOLERANCE for row in rows), [(r["way"], r["error"]) for r in rows]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2.5-vl"])
def test_a_prompt_is_described_as_it_is_made(name):
    model, size = toy(name), SHAPES[name].image_size
    inputs = make_inputs(model, size, images=2, text_tokens=30)
    whole = memory.make_prompt(model.config, size, 2, 30)
    assert (whole.length, whole.cells) == (inputs["input_ids"].shape[1], whole.kept)
    short = memory.make_prompt(model.config, size, 2, 30, 0.49)
    assert short.length == compressed(model, inputs, 0.49, build_decoder("pruned", model))().length


@pytest.mark.parametrize("name", TOYS)
def test_keys_and_values_of_a_prompt_are_those_in_its_cache(name):
    model, size = toy(name), SHAPES[name].image_size
    prefill = uncompressed(model, make_inputs(model, size, batch=2))()
    row = memory._batch_row(model, memory.make_prompt(model.config, size), None, 0.0, 2.0)
    assert 2 * row["kv_bytes"] == prefill.kv_bytes


def test_a_growing_cache_is_predicted():
    model = toy("tiny")
    inputs = make_inputs(model, SHAPES["tiny"].image_size)
    prefill = first_token(model, inputs)
    steps = 3

    def decode():
        for _ in range(steps):
            model(input_ids=prefill.first_token[:, None], past_key_values=prefill.cache, use_cache=True)

    grown = memory.peak_bytes(decode)  # all layers anew: every step copies each of them
    prompt = memory.make_prompt(model.config, SHAPES["tiny"].image_size, answer_tokens=steps)
    assert memory.stage_bytes(model, prompt)["decoding"].of(1) == pytest.approx(grown, rel=0.25)


stages = st.dictionaries(
    st.sampled_from(["vision", "prefill", "reading", "decoding"]),
    st.builds(Bytes, st.integers(0, 1000), st.integers(1, 500)),
    min_size=1,
)


@given(stages, st.integers(0, 20_000), st.integers(0, 5_000), st.integers(0, 50))
def test_the_largest_batch_fits_and_the_next_does_not(needs, budget, held, inputs):
    batch, limit = memory.largest_batch(budget, held, needs, inputs)

    def fits(rows):
        return all(held + need.of(rows) + rows * inputs <= budget for need in needs.values())

    assert batch == 0 or fits(batch)
    assert not fits(batch + 1)
    assert limit in needs


@given(stages, st.integers(1, 100), st.integers(0, 50_000))
def test_one_row_at_a_time_never_needs_more(needs, kv_row, budget):
    needs = {**needs, "decoding": Bytes(0, kv_row), "prefill": Bytes(0, kv_row + 17)}
    at_once = {name: need if need.per_row >= kv_row else Bytes(need.fixed, kv_row) for name, need in needs.items()}
    one = memory.one_by_one(at_once, kv_row)
    assert memory.largest_batch(budget, 0, one)[0] >= memory.largest_batch(budget, 0, at_once)[0]


def test_more_fits_the_more_is_removed_and_the_whole_shape_is_never_allocated():
    rows = memory.run("qwen2-vl-2b", budgets=(24.0,), reductions=(0.16, 0.49))
    for prefill in (memory.AT_ONCE, memory.ONE_BY_ONE):
        batches = [row["batch"] for row in rows if row["prefill"] == prefill]
        assert batches == sorted(batches)
        assert batches[0] > 0
    assert rows[0]["weight_bytes"] > 4e9
    assert all(row["ratio"] >= 1 for row in rows)


def test_what_cannot_hold_the_weights_holds_no_row():
    rows = memory.run("llava-1.5-7b", budgets=(4.0,), reductions=(0.49,))
    assert {row["batch"] for row in rows} == {0}
    assert {row["ratio"] for row in rows} == {None}


def test_a_budget_below_the_reserve_is_refused():
    with pytest.raises(ValueError, match="reserve"):
        memory.run("tiny", budgets=(0.5,))
