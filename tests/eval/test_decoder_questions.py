"""The oracle and its control compress by exactly the map they stand for; known arms get known differences."""

import pytest
import torch

from dualstream.eval.decoder_metrics import BASELINE, DecoderReadings, read_batch, read_pictures
from dualstream.eval.decoder_questions import (
    CONTROL_MAP,
    ORACLE,
    GivenReadings,
    answer_with_decoders,
    llm_map_decoder,
)
from dualstream.eval.scene_questions import FULL, answer_items, draw_items, summarize
from dualstream.modeling import CompressionConfig, VisualDecoder, compressing, load_model, run_length_plan
from dualstream.modeling.lens import read_visual_tokens
from dualstream.processing import build_inputs, register_processors

METHODS = ("rle", "rle_drop_top1", "rle_drop_top2")
MODELS = ("tiny-llava", "tiny-qwen2-vl")
PLAN = ("segment", "anchor", "kept_per_block", "run")


@pytest.fixture(scope="module", params=MODELS)
def embedded(request):
    register_processors()
    return load_model(request.param, device="cpu")


@pytest.fixture(scope="module")
def items():
    return draw_items(7, "validation", seed=1, image_size=96)


def inputs_of(processor, items):
    inputs = build_inputs(processor, [item.image for item in items], [item.question for item in items])
    inputs.pop("compression", None)
    return inputs


def plan_under(model, inputs, decoder, method, tokenizer):
    with torch.no_grad(), compressing(model, method=method, decoder=decoder, tokenizer=tokenizer):
        model(**inputs)
        return model.last_compression.plan


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("final_norm", [True, False])
def test_the_oracle_plans_by_the_llms_own_readings(embedded, items, method, final_norm):
    model, processor = embedded
    inputs = inputs_of(processor, items)
    depth = len(model.model.language_model.layers) - (not final_norm)
    reading = read_visual_tokens(model, inputs, depth=depth, final_norm=final_norm, top_k=2)
    images = [item.image for item in items]
    oracle = llm_map_decoder(model, processor, images, depth, final_norm)(0, len(items))
    tables = oracle.meaningless, oracle.text_class
    expected = run_length_plan(reading.ids, reading.grids, CompressionConfig(method), *tables)
    found = plan_under(model, inputs, oracle, method, processor.tokenizer)
    for name in PLAN:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.num_kept < found.num_cells


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_given_readings_drive_the_plan_of_every_family(tiny_model, family):
    model, make = tiny_model(family)
    inputs = make(["tit", "tititt"])
    reading = read_visual_tokens(model, inputs, depth=1, top_k=2)
    readings = reading.ids % 3
    found = plan_under(model, inputs, GivenReadings.for_model(model).giving(readings), "rle", None)
    expected = run_length_plan(readings, reading.grids, CompressionConfig("rle"))
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in PLAN)


def test_a_batch_of_the_oracle_is_that_part_of_the_whole(embedded, items):
    model, processor = embedded
    images = [item.image for item in items]
    whole = read_pictures(model, processor, images, {}, batch_size=3)
    oracle = llm_map_decoder(model, processor, images)
    parts = torch.cat([oracle(0, 3).readings, oracle(3, 6).readings, oracle(6, 7).readings])
    assert float((parts[:, 0] == whole.teacher[:, 0]).float().mean()) > 0.99  # batches differ in the last bits


def test_the_control_reads_the_next_picture_across_batches(embedded, items):
    model, processor = embedded
    images = [item.image for item in items]
    expected = read_batch(model, processor, images).other_picture()
    control = llm_map_decoder(model, processor, images, of_next_image=True)
    parts = torch.cat([control(start, min(start + 3, 7)).readings for start in (0, 3, 6)])
    assert parts.shape == expected.shape
    assert float((parts[:, 0] == expected[:, 0]).float().mean()) > 0.99
    own = read_batch(model, processor, images).teacher
    assert not torch.equal(parts, own)


def test_one_pass_reads_as_the_separate_functions_do(embedded, items):
    model, processor = embedded
    inputs = inputs_of(processor, items)
    images = [item.image for item in items]
    decoder = VisualDecoder.from_unembedding(model.get_output_embeddings().weight)
    found = read_batch(model, processor, images, {"plain": decoder})
    teacher = read_visual_tokens(model, inputs, depth=len(model.model.language_model.layers), top_k=2)
    plain = read_visual_tokens(model, inputs, top_k=5, decoder=decoder)
    assert torch.equal(found.students["plain"], plain.ids)
    assert float((found.teacher == teacher.ids).float().mean()) > 0.99  # other question, other padding
    assert torch.equal(found.grids, teacher.grids) and torch.equal(found.image_index, teacher.image_index)
    assert isinstance(found, DecoderReadings)


def test_arms_and_their_differences(embedded, items):
    model, processor = embedded
    plain = VisualDecoder.from_unembedding(model.get_output_embeddings().weight)
    own = getattr(model, "visual_decoder", plain)
    rows = answer_with_decoders(model, processor, items, {"copy": plain, "own": own}, batch_size=4)
    summary = {row["arm"]: row for row in summarize(rows, references=(FULL, BASELINE, ORACLE))}
    assert list(summary) == [FULL, BASELINE, "copy", "own", ORACLE, CONTROL_MAP]
    answers = {arm: [(row["answer"], row["kept_tokens"]) for row in rows if row["arm"] == arm] for arm in summary}
    assert answers["copy"] == answers[BASELINE]
    assert summary["copy"][f"difference_to_{BASELINE}"]["value"] == 0
    assert summary[ORACLE][f"difference_to_{ORACLE}"] is None
    usual = answer_items(model, processor, items, ("rle",), batch_size=4)
    assert answers[FULL] == [(row["answer"], row["kept_tokens"]) for row in usual if row["arm"] == FULL]
    assert answers["own"] == [(row["answer"], row["kept_tokens"]) for row in usual if row["arm"] == "rle"]
    seeds = {arm: [row["seed"] for row in rows if row["arm"] == arm] for arm in summary}
    assert all(order == [item.seed for item in items] for order in seeds.values())


def test_bad_input_is_refused(tiny_model):
    model = tiny_model("llava").model
    decoder = GivenReadings.for_model(model).giving(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="2 readings of 4 cells were given, but 1 of 5 cells"):
        decoder.top_k(torch.zeros(5, 64))
    with pytest.raises(ValueError, match="but 3 of 4 cells"):
        decoder.top_k(torch.zeros(4, 64), 3)
    with pytest.raises(ValueError, match="cannot be called 'llm map'"):
        answer_with_decoders(model, None, [], {ORACLE: decoder})
