import pytest
import torch

from dualstream.benchmarks.prefill import feature_grids
from dualstream.benchmarks.shapes import SHAPES, build_model
from dualstream.benchmarks.workload import image_inputs_of, make_inputs
from dualstream.modeling.families import family_of

TOYS = [name for name, shape in SHAPES.items() if shape.is_toy]


@pytest.mark.parametrize("name", TOYS)
def test_prompts_are_what_stock_models_accept(name):
    model = build_model(name, layers=1, vision_layers=1)
    inputs = make_inputs(model, SHAPES[name].image_size, batch=3, images=2, text_tokens=9, ragged=True)
    with torch.no_grad():
        logits = model(**inputs).logits  # raises if placeholders and features differ
    assert logits.isfinite().all()
    grids = feature_grids(model, inputs)
    placeholders = (inputs["input_ids"] == family_of(model).image_token_id(model.config)).sum(1)
    assert placeholders.tolist() == [int(grids.prod(-1).sum()) // 3] * 3
    padding = (inputs["attention_mask"] == 0).sum(1)
    assert padding.tolist() == [0, 1, 2] and not inputs["attention_mask"][2, :2].any()
    assert set(image_inputs_of(model, inputs)) == set(family_of(model).image_input_names) & set(inputs)
    assert inputs["pixel_values"].dtype == model.dtype


def test_same_seed_same_prompt():
    model = build_model("tiny", 1, 1)
    first, again, other = (make_inputs(model, (336, 336), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("tiny", (224, 336), {}, "does not suit a tower of 336x336"),
        ("tiny-qwen2-vl", (30, 28), {}, "cells of 28 pixels"),
        ("tiny-internvl", (448, 500), {}, "does not suit a tower of 448x448"),
        ("tiny", (336, 336), {"batch": 0}, "batch=0"),
        ("tiny", (336, 336), {"batch": 4, "text_tokens": 3, "ragged": True}, "at least batch=4"),
    ],
)
def test_what_does_not_suit_is_refused(name, size, options, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(build_model(name, 1, 1), size, **options)
