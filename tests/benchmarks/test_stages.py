import pytest
import torch

from dualstream.benchmarks import headline, stages
from dualstream.benchmarks.forced_map import build_decoder
from dualstream.benchmarks.prefill import FULL, LIMIT
from dualstream.benchmarks.shapes import build_model
from dualstream.benchmarks.workload import make_inputs
from dualstream.measuring import Clock
from dualstream.modeling.families import family_of

OPENED = {"tiny": (336, 336), "tiny-qwen2.5-vl": (112, 168)}


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", OPENED)
def test_stages_of_all_ways(name):
    model = build_model(name, 2, 2)
    inputs = make_inputs(model, OPENED[name], batch=2, text_tokens=5)
    with torch.no_grad():
        model(**inputs)  # transformers sets hooks of its own at the first call
    before = hooks(model)
    rows = stages.run(model, inputs, 0.4, ["pruned", "linear"], 2, Clock(), new_tokens=2)
    assert hooks(model) == before
    by_way = {}
    for row in rows:
        by_way.setdefault(row["way"], {})[row["stage"]] = row
    whole = {"preparing", "vision", "connector", "joining", "prefill", "head"}
    assert set(by_way[FULL]) == whole | {"first token", "decoding step", "generate, first token"}
    assert set(by_way[LIMIT]) == whole | {"first token"}
    assert set(by_way["compressed, linear"]) == whole | {"first token", "reading"}
    assert set(by_way["by itself"]) == {"reading, pruned", "reading, linear", "plan", "pool", "rewrite"}
    for way in (FULL, LIMIT, "compressed, linear"):
        assert sum(by_way[way][stage]["share"] for stage in whole & set(by_way[way])) <= 1.2
    assert by_way[FULL]["prefill"]["share_of_prefill"]["value"] == 1


def test_all_blocks_are_calculated_round_by_round():
    passes = {
        FULL: [{"vision": 1.0, "reading": 0.0, "prefill": 4.0}, {"vision": 1.0, "reading": 0.0, "prefill": 6.0}],
        LIMIT: [{"vision": 1.0, "reading": 0.0, "prefill": 2.0}, {"vision": 1.0, "reading": 0.0, "prefill": 3.0}],
        "compressed, linear": [{"vision": 1.0, "reading": 1.0, "prefill": p} for p in (2.0, 3.0)],
    }
    rows = stages._sum_rows(passes, {"prefill": 8, "vision": 2}, stages.FULL_DEPTH_SUM)
    found = {row["way"]: row for row in rows}
    assert found[FULL]["median_ms"] == pytest.approx(1000 * (34 + 50) / 2)
    assert found[LIMIT]["ratio"] == 1
    assert found["compressed, linear"]["ratio"] == pytest.approx((19 / 18 + 27 / 26) / 2)
    measured = stages._sum_rows(passes, {}, stages.MEASURED_SUM)[-1]
    assert measured["ratio"] == pytest.approx((4 / 3 + 5 / 4) / 2)


def test_hooks_leave_after_an_error():
    model = build_model("tiny", 1, 1)
    clock = stages.StageClock(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="stop"), stages.marked_stages(model, build_decoder("linear", model), clock):
        assert hooks(model) == 6
        raise RuntimeError("stop")
    assert hooks(model) == 0


def test_marks_add_up():
    model = build_model("tiny", 1, 1)
    inputs = make_inputs(model, (336, 336))
    clock = stages.StageClock(torch.device("cpu"))
    clock.mark("preparing")
    with stages.marked_stages(model, None, clock), torch.no_grad():
        model(**inputs)
        clock.mark("end")
    marks = list(clock._marks)
    found = clock.take()
    assert sum(found.values()) == pytest.approx(marks[-1][1] - marks[0][1])
    assert [stage for stage, _ in marks] == [
        "preparing",
        "vision",
        "joining",
        "connector",
        "joining",
        "prefill",
        "head",
        "end",
    ]
    assert found["reading"] == 0 and clock.take() == dict.fromkeys(stages.STAGES, 0.0)
    assert family_of(model).name == "llava"


def test_headline_rows():
    model = build_model("tiny", 1, 1)
    inputs = make_inputs(model, (336, 336), text_tokens=5)
    rows = headline.run(model, inputs, [0.28, 0.58], ["pruned"], 2, Clock())
    assert [row["way"] for row in rows] == [FULL, LIMIT, headline.CONTROL, "compressed, pruned"] * 2
    for row in rows:
        assert row["kept_tokens"] == (576 if row["way"] == FULL else {0.28: 415, 0.58: 242}[row["reduction"]])
        assert row["prompt_length"] == row["kept_tokens"] + 5
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    limit, ours = rows[1], rows[3]
    assert limit["ratio"] == 1 and ours["kv_bytes"] == limit["kv_bytes"]
    # What reading adds is one product with as many rows as there are classes.
    decoder = build_decoder("pruned", model)
    assert ours["flops"] - limit["flops"] == 2 * 576 * decoder.multiply_adds
    assert len(headline.describe(rows).splitlines()) == 8
