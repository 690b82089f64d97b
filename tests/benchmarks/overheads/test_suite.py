"""The jobs run as they are timed; how much the model computes in them is counted, which no machine changes."""

import importlib.util
import json
from itertools import pairwise

import pytest
import torch

from dualstream.benchmarks.overheads import suite as overheads
from dualstream.benchmarks.overheads.jobs import ARMS, JOBS, open_subject
from dualstream.measuring import count_work
from dualstream.modeling import family_of
from dualstream.modeling.lens import image_features_and_states

MODELS = ("tiny-llava", "tiny-qwen2-vl")
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (pip install dualstream[eval])"
)


@pytest.fixture(scope="module", params=MODELS)
def subject(request):
    return open_subject(request.param, 3, 1)  # batches of one: no padding, so that counts of two orders agree


@pytest.fixture(autouse=True)
def leave_no_accelerator():
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def flops(function):
    return count_work(function).flops


def ways_of(name, subject):
    return {way: function for job in JOBS[name](subject) for way, function in job.ways.items()}


@needs_harness
def test_rows_of_every_job():
    calls = []
    rows = overheads.run(2, lambda: calls.append(1), ["tiny-llava"], images=2)
    assert {row["job"].partition(",")[0] for row in rows} == {*JOBS, "lmms-eval"} - {"lmms"}
    assert len(calls) == len(rows) * (2 + 1)
    for row in rows:
        assert row["suite"] == "overheads" and row["model"] == "tiny-llava" and row["rounds"] == 2
        assert row["images"] in (2, 8) and row["batch"] == 2 and row["visual_tokens"] > 50
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["ratio_to"].startswith("bare ")
        assert row["ratio"] == 1 or row["way"] != row["ratio_to"]
    for job in {(row["job"], row["ratio_to"]) for row in rows}:
        assert sum((row["job"], row["way"]) == job for row in rows) == 1, "the bare pass is a row of its job"
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_an_unknown_job_is_named():
    with pytest.raises(ValueError, match="jobs='sleep' is unknown; accepted are corpus, sweep"):
        overheads.run(2, jobs=["sleep"])


def test_a_corpus_costs_the_model_no_more_than_the_bare_passes(subject):
    ways = ways_of("corpus", subject)
    bare, opened, built = (flops(way) for way in ways.values())  # of this thread: the model's
    assert bare == opened == built > 0


def test_the_teacher_stops_at_its_depth_and_at_the_last_image(subject):
    model, inputs = subject.model, subject.inputs[0]
    layers = len(family_of(model).llm_blocks(model))
    costs = [flops(lambda depth=depth: image_features_and_states(model, inputs, depth)) for depth in range(layers + 1)]
    steps = {after - before for before, after in pairwise(costs)}
    assert len(steps) == 1 and steps.pop() > 0, "every block costs the same, and none runs unasked"
    longer = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in longer:
            tail = (
                torch.ones(1, 40, dtype=torch.long) if name == "attention_mask" else longer[name][:, -1:].repeat(1, 40)
            )
            longer[name] = torch.cat([longer[name], tail], 1)
    assert flops(lambda: image_features_and_states(model, longer, layers)) == costs[-1]
    assert costs[-1] < flops(subject.forward) / len(subject.items)


def test_sweeps_run_the_tower_once(subject):
    blocks = family_of(subject.model).vision_blocks(subject.model)
    runs = []
    handle = blocks[0].register_forward_hook(lambda *_: runs.append(1))
    counts = {}
    for name in ("sweep", "states"):
        for way, function in ways_of(name, subject).items():
            runs.clear()
            function()
            counts[way] = len(runs)
    handle.remove()
    slow = counts.pop("tower's depths, a forward each")
    assert set(counts.values()) == {len(subject.items)}
    assert slow == len(subject.items) * len(blocks), "once per depth but depth 0"


def test_further_compressions_cost_no_further_tower(subject):
    ways = ways_of("options", subject)
    inputs = [
        {name: each[name] for name in family_of(subject.model).image_input_names if name in each}
        for each in subject.inputs
    ]
    tower = sum(
        flops(lambda each=each: subject.model.model.get_image_features(**each, return_dict=True)) for each in inputs
    )
    saved = flops(ways["one after the other"]) - flops(ways["encoded once"])
    assert saved == (len(ARMS) - 1) * tower > 0


@needs_harness
def test_the_plugin_asks_the_model_for_what_a_bare_call_does(subject):
    ways = ways_of("lmms", subject)
    for suffix in ("", ", rle"):
        assert flops(ways[f"generate_until{suffix}"]) == flops(ways[f"bare generate{suffix}"]) > 0
        bare, scored = flops(ways[f"bare forward{suffix}"]), flops(ways[f"loglikelihood{suffix}"])
        assert bare <= scored < 1.05 * bare, "more by the further tokens of the options alone"
    assert flops(ways["generate_until, rle"]) < flops(ways["generate_until"])
    assert [answer.text for answer in ways["generate_until"]()] != [""] * len(subject.items)
