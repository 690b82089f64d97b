"""Suites, scores, cells, figures and tables of ``dualstream eval``: all that needs no harness."""

import json
import math

import numpy as np
import pytest

from dualstream.eval.spatial_tasks import TASKS_DIR, judge_text, make_docs
from dualstream.eval.statistics import paired_difference, proportion
from dualstream.eval.suites.benchmarks import SUITES, Benchmark, benchmarks_of, published
from dualstream.eval.suites.cells import Cell, read_cell, weights_stamp, write_cell
from dualstream.eval.suites.report import _spread, draw, group_tables
from dualstream.eval.suites.scores import (
    IncompleteRunError,
    add_costs,
    batch_seconds,
    check_complete,
    score_items,
)
from dualstream.eval.suites.summary import accuracy, difference, mean, median, retention, summarize

FAIR, PAPER = (Benchmark(f"scenes_whatsup_{kind}", f"scenes, {kind}", kind) for kind in ("fair", "paper"))
POPE = Benchmark("pope", "table1", "pope", "image_source")


@pytest.fixture(autouse=True)
def eight_scenes(monkeypatch):
    monkeypatch.setenv("DUALSTREAM_SCENES", "8")


# --------------------------------------------------------------------------------------------------- suites


def test_our_tasks_of_the_suites_are_the_task_files():
    files = {path.stem for path in TASKS_DIR.glob("*.yaml") if path.stem.endswith(("_fair", "_paper"))}
    tasks = {name for name in files if f"\ntask: {name}\n" in (TASKS_DIR / f"{name}.yaml").read_text() + "\n"}
    assert {b.name for suite in ("table2", "scenes") for b in SUITES[suite]} == tasks
    assert [b.name for b in SUITES["table1"]] == ["gqa", "textvqa_val", "mmbench_en_dev_static", "pope"]


def test_suites_and_tasks_are_chosen_by_name():
    assert len(benchmarks_of("all")) == sum(map(len, SUITES.values()))
    names = [b.name for b in benchmarks_of("scenes", "scenes_relation,scenes_count_paper")]
    assert names == ["scenes_relation_fair", "scenes_count_paper", "scenes_relation_paper"]
    with pytest.raises(ValueError, match="suite 'table3' is unknown; accepted are table1, table2, scenes, all"):
        benchmarks_of("table3")
    with pytest.raises(ValueError, match="gqa is not in suite scenes; accepted are scenes_presence_fair"):
        benchmarks_of("scenes", "gqa,scenes_count")


def test_published_values_are_those_of_the_model_or_of_all_published_ones():
    llava = "llava-hf/llava-1.5-7b-hf"
    assert [(p.model, p.value) for p in published(llava, "gqa", "paper:rle")] == [(llava, 61.32)]
    assert published("Qwen/Qwen2.5-VL-7B-Instruct", "gqa", "rle_drop_top1") == []
    assert sorted(p.value for p in published("tiny-llava", "pope", "none")) == [85.96, 89.23]
    assert published("tiny-llava", "scenes_count_fair", "none") == []
    assert published("tiny-llava", "gqa", "random@rle") == []


# --------------------------------------------------------------------------------------------------- scores


def fair_samples(task, choose):
    """What the harness logs when option ``choose(doc)`` (a place) always has the least loss."""
    samples = []
    for number, doc in enumerate(make_docs(task, "fair")):
        losses = [float(place != choose(doc)) for place in range(len(doc["choices"]))]
        row = {key: doc[key] for key in ("item", "order", "orders", "shown", "answer", "relations")}
        row |= {key: doc[key] for key in ("pair_id", "set_id", "set_size")}
        row |= {"losses": losses, "greedy": [loss == 0 for loss in losses]}
        answers = [(loss, loss == 0) for loss in losses]
        samples.append({"doc_id": number, "doc": doc, "filtered_resps": answers, "individual": row})
    return samples


def right(doc):
    return doc["shown"].index(doc["answer"])


def test_whoever_always_takes_the_first_option_is_at_chance_and_whoever_is_right_is_right():
    benchmark = Benchmark("scenes_whatsup_letters_fair", "scenes, fair", "fair")
    rows = score_items(benchmark, fair_samples("scenes_whatsup_letters", lambda doc: 0))
    assert [row["score"] for row in rows] == [0.25] * 8
    assert len({row["cluster"] for row in rows}) == 2  # two sets of four pictures
    assert {row["score"] for row in score_items(FAIR, fair_samples("scenes_whatsup", right))} == {1.0}


def test_written_answers_become_scores():
    docs = make_docs("scenes_whatsup", "paper")
    samples = [
        {"doc_id": n, "doc": doc, "filtered_resps": [text], "individual": vars(judge_text(doc, text))}
        for n, (doc, text) in enumerate((doc, doc["target"] if n % 2 else "no idea") for n, doc in enumerate(docs))
    ]
    check_complete(PAPER, samples, 8)
    rows = score_items(PAPER, samples[::-1])
    assert [row["item"] for row in rows] == [doc["item"] for doc in docs]
    assert [row["score"] for row in rows] == [0.0, 1.0] * 4
    assert [row["invalid"] for row in rows] == [1.0, 0.0] * 4


def test_missing_doubled_and_unusable_answers_are_found():
    samples = fair_samples("scenes_whatsup", right)
    check_complete(FAIR, samples, len(samples))
    with pytest.raises(IncompleteRunError, match=r"31 of 32 samples are answered .*missing: 3\)"):
        check_complete(FAIR, samples[:3] + samples[4:], 32)
    with pytest.raises(IncompleteRunError, match="33 answers"):
        check_complete(FAIR, [*samples, samples[0]], 32)
    with pytest.raises(IncompleteRunError, match="32 of 40"):
        check_complete(FAIR, samples, 40)
    for broken in ([(math.nan, True)] * 4, [(0.0, True)] * 3, []):
        with pytest.raises(IncompleteRunError, match="sample 0 has no usable answer"):
            check_complete(FAIR, [{**samples[0], "filtered_resps": broken}, *samples[1:]], 32)
    for broken in ([None], [], ["a", "b"], [3]):
        sample = {"doc_id": 0, "doc": {}, "filtered_resps": broken}
        with pytest.raises(IncompleteRunError, match="sample 0 has no usable answer"):
            check_complete(POPE, [sample], 1)
    with pytest.raises(IncompleteRunError, match="7 of 8 items have all their orders"):
        score_items(FAIR, samples[1:])


def test_costs_of_the_orders_of_an_item_are_averaged():
    samples = fair_samples("scenes_whatsup", right)
    rows = score_items(FAIR, samples)
    records = [
        {
            "task": FAIR.name,
            "doc_id": n,
            "visual_tokens": 64,
            "kept_tokens": n % 4,
            "prompt_tokens": 9,
            "seconds": n // 16,
        }
        for n in range(32)
    ]
    add_costs(FAIR, rows, samples, [*records, {"task": "another", "doc_id": 0}])
    assert [row["kept_tokens"] for row in rows] == [1.5] * 8
    assert batch_seconds(FAIR, records) == [0.0, 1.0]
    with pytest.raises(IncompleteRunError, match=r"no record of what samples \[31\] cost"):
        add_costs(FAIR, rows, samples, records[:-1])


# --------------------------------------------------------------------------------------------------- cells


def test_a_cell_is_found_again_only_with_its_settings(tmp_path):
    cell = Cell("org/model", "rle:seed=1", "pope")
    assert read_cell(cell, tmp_path, {"limit": 4}) is None
    write_cell(cell, tmp_path, {"limit": 4, "dtype": "auto"}, {"items": [1]})
    assert read_cell(cell, tmp_path, {"limit": 4, "dtype": "auto"})["items"] == [1]
    with pytest.raises(ValueError, match=r"was made with limit=4, not 8; give another --out"):
        read_cell(cell, tmp_path, {"limit": 8, "dtype": "auto"})
    cell.path(tmp_path).write_text('{"items": [')
    with pytest.raises(ValueError, match="is damaged; remove it"):
        read_cell(cell, tmp_path, {"limit": 4})
    names = {Cell(m, a, "t").path(tmp_path) for m in ("a/b", "a_b", "a-b") for a in ("rle:a=1", "rle_a=1")}
    assert len(names) == 6


def test_a_changed_checkpoint_is_another_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12")
    before = weights_stamp(tmp_path)
    assert weights_stamp(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert weights_stamp(tmp_path) != before


# --------------------------------------------------------------------------------------------------- figures


def test_intervals_of_one_task_are_the_known_ones():
    scores = np.array([1, 1, 0, 1, 0, 1, 1, 1.0])
    names = [str(n) for n in range(8)]
    assert accuracy([scores], [names]).value == 0.75
    wilson, ours = proportion(scores), accuracy([scores], [names])
    assert abs(ours.low - wilson.low) < 0.03
    same = difference([scores], [scores], [names])
    assert (same.low, same.high) == (paired_difference(np.ones(8), np.ones(8)).low, -same.low)
    assert same.value == 0
    assert same.high > 0.05
    kept = retention([scores], [scores], [names])
    assert kept.value == 1
    assert (kept.low, kept.high) == pytest.approx((1 + same.low / 0.75, 1 + same.high / 0.75))


def test_paired_difference_of_clusters_is_that_of_cluster_sums():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(300), 3)
    level = rng.normal(size=300)[clusters]
    full = (rng.normal(size=900) + level > 0).astype(float)
    arm = np.where(rng.random(900) < 0.1, 0.0, full)
    found = difference([arm], [full], [[str(c) for c in clusters]])
    per_cluster = (arm - full).reshape(300, 3).mean(1)
    error = per_cluster.std(ddof=1) / np.sqrt(300)
    assert found.value == pytest.approx(per_cluster.mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)
    assert found.n == 300
    ratio = retention([arm], [full], [[str(c) for c in clusters]])
    assert ratio.value == pytest.approx(arm.mean() / full.mean())
    assert ratio.low < ratio.value < ratio.high < 1


def test_a_mean_over_tasks_gives_every_task_the_same_weight():
    rng = np.random.default_rng(0)
    small, large = rng.random(40), rng.random(900)
    found = mean([small, large], [list(map(str, range(40))), list(map(str, range(900)))])
    assert found.value == pytest.approx((small.mean() + large.mean()) / 2)
    error = np.sqrt(small.var(ddof=1) / 40 + large.var(ddof=1) / 900) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.n == 940


def test_all_right_is_not_certain():
    ones = [np.ones(20), np.ones(20)]
    names = [list(map(str, range(20)))] * 2
    assert accuracy(ones, names).low == pytest.approx(proportion(np.ones(40)).low)
    assert retention([np.zeros(20)], [np.zeros(20)], names[:1]) is None
    assert median([2.0, 1.0, 9.0]).value == 2.0
    assert median([2.0]).low == median([2.0]).high == 2.0


def cell_of(scores, kept, sets=False):
    items = [
        {
            "item": str(n),
            "cluster": str(n // 4 if sets else n),
            "score": float(score),
            "invalid": 0.0,
            "visual_tokens": 64,
            "kept_tokens": kept,
            "prompt_tokens": 20 + kept,
            **({"pair_id": str(n // 2), "set_id": str(n // 4), "set_size": 4} if sets else {}),
        }
        for n, score in enumerate(scores)
    ]
    return {"items": items, "batch_seconds": [0.01, 0.02, 0.03], "kv_bytes_per_token": 10, "harness": {}, "seconds": 1}


@pytest.fixture
def rows():
    one = Benchmark("scenes_count_fair", "scenes, fair", "fair")
    cells = {
        ("m", "none", one.name): cell_of([1, 1, 0, 1] * 5, 64),
        ("m", "rle", one.name): cell_of([1, 1, 0, 0] * 5, 32),
        ("m", "none", FAIR.name): cell_of([1, 1, 1, 1, 1, 1, 1, 0], 64, sets=True),
        ("m", "rle", FAIR.name): cell_of([1, 1, 1, 1, 0, 1, 1, 0], 16, sets=True),
        ("m", "random@rle", one.name): cell_of([1, 0, 0, 0] * 5, 32),
        ("m", "random@rle", FAIR.name): cell_of([0, 0, 1, 1, 0, 1, 1, 0], 16, sets=True),
    }
    return summarize(cells, [one, FAIR])


def test_summary_of_two_tasks_and_their_mean(rows):
    by = {(row["task"], row["arm"]): row for row in rows}
    assert list(by) == [
        (t, a) for t in ("scenes_count_fair", FAIR.name, "mean") for a in ("none", "rle", "random@rle")
    ]
    assert by["scenes_count_fair", "random@rle"]["difference"]["value"] == pytest.approx(-0.5)
    assert by["scenes_count_fair", "random@rle"]["difference_to_matched"]["value"] == pytest.approx(-0.25)
    assert by["mean", "random@rle"]["difference_to_matched"]["value"] == pytest.approx((-0.25 - 0.25) / 2)
    assert by["mean", "rle"]["difference_to_matched"] is None
    assert by["scenes_count_fair", "rle"]["difference"]["value"] == pytest.approx(-0.25)
    assert by["scenes_count_fair", "rle"]["reduction_rate"]["value"] == 0.5
    assert by["mean", "rle"]["reduction_rate"]["value"] == pytest.approx((0.5 + 0.75) / 2)
    assert by["mean", "rle"]["accuracy"]["value"] == pytest.approx((0.5 + 6 / 8) / 2)
    assert by["mean", "rle"]["difference"]["value"] == pytest.approx((0.5 + 6 / 8) / 2 - (0.75 + 7 / 8) / 2)
    assert by["mean", "none"]["difference"] is by["mean", "none"]["retention"] is None
    assert by["mean", "none"]["seconds"] == {"value": 0.02, "low": 0.01, "high": 0.03, "n": 6}
    assert by["mean", "none"]["kv_bytes"]["value"] == 840
    assert (by[FAIR.name, "rle"]["pair"]["value"], by[FAIR.name, "rle"]["set"]["value"]) == (0.5, 0.5)
    assert by[FAIR.name, "rle"]["accuracy"]["n"] == 2
    json.dumps(rows, allow_nan=False)


def test_arms_must_have_answered_the_same_items():
    one = Benchmark("scenes_count_fair", "scenes, fair", "fair")
    cells = {("m", "none", one.name): cell_of([1, 1], 4), ("m", "rle", one.name): cell_of([1], 4)}
    with pytest.raises(ValueError, match="arms none and rle did not answer the same items"):
        summarize(cells, [one])


def test_tables_and_figure(rows, tmp_path):
    text = group_tables(rows)
    assert "### m: scenes, fair" in text
    assert "mean of 2 tasks; 28 items in 22 independent units" in text
    assert "| `rle` | 62.5 [" in text
    assert "Whole sets right, %" in text
    assert "Published" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == lines[0].count("|") for line in lines[:4])
    draw(rows, tmp_path / "figure.png")
    draw(rows, tmp_path / "again.png")
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_markers_that_would_cover_each_other_stand_side_by_side():
    assert _spread({"a": 60.0, "b": 60.0, "c": 60.2, "d": 80.0}, 1.0) == pytest.approx(
        {"a": 60.2 / 3 + 39, "b": 60.2 / 3 + 40, "c": 60.2 / 3 + 41, "d": 80.0}
    )


def test_published_values_stand_apart_and_name_their_model():
    gqa = Benchmark("gqa", "table1", "exact_match", "imageId")
    cells = {("tiny-llava", arm, "gqa"): cell_of([1, 0], 4) for arm in ("none", "paper:rle")}
    text = group_tables(summarize(cells, [gqa]))
    assert "Published (not run here)" in text
    assert "| `paper:rle`, llava-hf/llava-1.5-7b-hf | 61.32 | 27.83 |" in text
    assert "| `none`, Qwen/Qwen2.5-VL-7B-Instruct | 61.20 | 0.00 |" in text
