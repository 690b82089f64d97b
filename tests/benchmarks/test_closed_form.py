"""Closed forms against counted FLOPs, of every family and every stage, and against sizes found by other means."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualstream.benchmarks import closed_form
from dualstream.benchmarks.forced_map import build_decoder
from dualstream.benchmarks.prefill import compressed, first_token, uncompressed
from dualstream.benchmarks.shapes import SHAPES, build_config, build_model
from dualstream.benchmarks.workload import image_inputs_of, make_inputs
from dualstream.measuring import count_work

TOYS = [name for name in SHAPES if name.startswith("tiny")]
OTHER_SIZE = {"tiny": (336, 336), "tiny-internvl": (896, 448)}  # the others: no whole number of windows


@functools.cache
def toy(name):
    return build_model(name)


def close(predicted, counted):
    assert predicted == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("other", [False, True])
def test_tower_and_connector_do_what_is_counted(name, other):
    model = toy(name)
    size = OTHER_SIZE.get(name, SHAPES[name].image_size)
    if other and name not in OTHER_SIZE:
        cell = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
        size = (7 * cell, 10 * cell)
    inputs = make_inputs(model, size, images=2)
    pictures = image_inputs_of(model, inputs)
    counted = count_work(lambda: model.model.get_image_features(**pictures, return_dict=True)).flops
    one = closed_form.tower_flops(model.config, size) + closed_form.connector_flops(model.config, size)
    close(2 * one.total, counted)
    cells = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert 2 * closed_form.tower_of(model.config, size).cells == cells


@pytest.mark.parametrize("name", TOYS)
def test_a_first_token_costs_what_is_counted(name):
    model, size = toy(name), SHAPES[name].image_size
    inputs = make_inputs(model, size, batch=2, text_tokens=40)
    cells = closed_form.tower_of(model.config, size).cells
    text = inputs["input_ids"].shape[1] - cells
    predicted = closed_form.first_token_flops(model.config, size, 1, text)
    close(2 * predicted.total, count_work(uncompressed(model, inputs)).flops)
    assert 0 < predicted.attention < predicted.total


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("decoder", ["pruned", "linear", "factored"])
def test_a_compressed_first_token_costs_its_reading_and_what_is_left(name, decoder):
    model, size = toy(name), SHAPES[name].image_size
    inputs = make_inputs(model, size, text_tokens=40)
    way = compressed(model, inputs, 0.5, build_decoder(decoder, model))
    kept_length = way().length
    cells = closed_form.tower_of(model.config, size).cells
    text = inputs["input_ids"].shape[1] - cells
    predicted = closed_form.first_token_flops(model.config, size, 1, text, kept_length - text, decoder)
    close(predicted.total, count_work(way).flops)


@pytest.mark.parametrize("name", TOYS)
def test_a_decoding_step_costs_what_is_counted(name):
    model = toy(name)
    prefill = first_token(model, make_inputs(model, SHAPES[name].image_size))
    length = prefill.length

    def step():
        model(input_ids=prefill.first_token[:, None], past_key_values=prefill.cache, use_cache=True)

    close(closed_form.answer_flops(model.config, length, 1).total, count_work(step).flops)
    close(closed_form.answer_flops(model.config, length + 1, 1).total, count_work(step).flops)


@given(st.integers(1, 300), st.integers(1, 40))
def test_many_steps_are_the_sum_of_single_ones(length, steps):
    config = build_config("qwen2.5-vl-7b")
    single = sum((closed_form.answer_flops(config, length + i, 1) for i in range(steps)), start=closed_form.Flops())
    assert closed_form.answer_flops(config, length, steps) == single


@given(st.integers(0, 60), st.integers(1, 9))
def test_windows_are_counted_with_their_rest(length, side):
    parts = [len(part) for part in torch.arange(length).split(side)]
    assert closed_form._squares(length, side) == sum(part**2 for part in parts)


@pytest.mark.parametrize("name", TOYS)
def test_weight_bytes_are_those_in_memory(name):
    model = toy(name)
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert closed_form.weight_bytes(model) == sum(storages.values())
