"""The study's design, pictures and controls; and the command from configuration to report, killed and continued."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.rope_scaling_study import command, runs
from dualstream.analysis.rope_scaling_study.controls import (
    control_settings,
    factors_of,
    permuted,
    random_of_equal_norm,
    reversed_factors,
    tower_frequencies,
)
from dualstream.analysis.rope_scaling_study.design import DEFAULT, TUNED_ARMS, Condition, Study, read_study
from dualstream.analysis.rope_scaling_study.items import draw_items, picture, placed, question, training_rows
from dualstream.analysis.rope_scaling_study.latency import measure_latency
from dualstream.analysis.rope_scaling_study.runs import Workbench, arm_units, grid_units, run_units, sft_config
from dualstream.cli import main
from dualstream.data_builders.spatial_sft import AXES, RELATIONS, make_set
from dualstream.modeling import RopeScaling, apply_rope_scaling

CONDITIONS = (
    Condition("trained", "in"),
    Condition("small", "tuned", scale=0.5),
    Condition("oblong", "out", scale=0.7, aspect=2.5, pixels=60, mirrored=True),
)
TINY = {
    "conditions": [
        {"name": "trained", "distribution": "in", "mirrored": True},
        {"name": "wide", "distribution": "out", "aspect": 1.5},
    ],
    "grid": {"poly": {"alpha": [0, 9], "p": [2]}, "exp": {"gamma": [5]}},
    "validation_sets": 1,
    "test_sets": 2,
    "non_spatial": 3,
    "seeds": 1,
    "draws": 1,
    "plain_arms": ["stock", "scaled", "permuted"],
    "tuned_arms": ["stock", "scaled"],
    "sft_sets": 2,
    "sft": {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True, "logging_steps": 1},
}


def small_study(**changes):
    return Study(conditions=CONDITIONS, grid={"exp": {"gamma": [2.0]}}, **changes)


# --- design


def test_the_default_design_is_read_and_holds_what_the_study_needs():
    study = read_study()
    assert {c.distribution for c in study.conditions} == {"in", "tuned", "out"}
    assert study.seeds >= 3 and set(study.plain_arms) >= set(TUNED_ARMS) - {"table"}
    assert len(study.candidates()) == len(set(study.candidates())) > 30
    assert DEFAULT.is_file()


def test_a_candidate_that_changes_nothing_is_no_candidate():
    study = Study(conditions=CONDITIONS, grid={"poly": {"alpha": [0, 9], "p": [2, 8]}, "exp": {"gamma": [1, 2]}})
    assert study.candidates() == ["poly:9:2", "poly:9:8", "exp:2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": []}, "'in'"),
        ({"conditions": [{"name": "a", "distribution": "out"}]}, "'in'"),
        ({"conditions": [{"name": "a", "distribution": "near"}]}, "'near'"),
        ({"conditions": [{"name": "a", "distribution": "in", "scale": 2}]}, "scale=2"),
        ({"conditions": [{"name": "a", "distribution": "in", "aspect": 9}]}, "aspect=9"),
        ({"forms": ["riddle"]}, "riddle"),
        ({"plain_arms": ["scaled"]}, "stock"),
        ({"tuned_arms": ["stock", "magic"]}, "magic"),
        ({"seeds": 0}, "seeds=0"),
        ({"grid": {"poly": {"alpha": [0]}}}, "changes anything"),
        ({"grid": {"cubic": {"alpha": [1]}}}, "cubic"),
        ({"tests": 3}, "unknown fields tests"),
    ],
)
def test_errors_name_what_was_given(tmp_path, changes, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(TINY | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_study(path)


def test_seeds_and_arms_do_not_make_another_study_but_pictures_do():
    study = small_study()
    assert replace(study, seeds=9, tuned_arms=("stock",)).settings() == study.settings()
    assert replace(study, test_sets=61).settings() != study.settings()
    assert study.limited(2).test_sets == 2 and study.limited(1000) == replace(study, non_spatial=study.non_spatial)


# --- pictures


@given(st.integers(0, 10_000), st.sampled_from(CONDITIONS))
@settings(max_examples=60, deadline=None)
def test_placing_keeps_relations_and_what_stands_still(set_id, condition):
    items = placed(make_set(set_id), condition, set_id)
    width, height = items[0].scene.width, items[0].scene.height
    assert sorted((width, height)) == [1, condition.aspect] and (height > width) == (
        set_id % 2 == 1 and condition.aspect > 1
    )
    for item, original in zip(items, make_set(set_id), strict=True):
        subject, reference = item.scene.objects
        dx, dy = subject.x - reference.x, subject.y - reference.y
        assert {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[item.relation]
        for o, before in zip(item.scene.objects, original.scene.objects, strict=True):
            assert o.radius == pytest.approx(before.radius * condition.scale)
            assert o.radius - 1e-9 <= o.x <= width - o.radius + 1e-9
            assert o.radius - 1e-9 <= o.y <= height - o.radius + 1e-9
    for axis in AXES.values():
        first, second = (next(i for i in items if i.relation == relation) for relation in axis)
        still = ("subject", "reference").index(first.anchor)
        a, b = first.scene.objects[still], second.scene.objects[still]
        assert (a.x, a.y) == pytest.approx((b.x, b.y))


def test_mirror_images_are_mirrored_and_swap_only_left_and_right():
    condition = CONDITIONS[2]
    plain = list(draw_items(condition, ("two-way",), 2, "test"))
    mirrored = list(draw_items(condition, ("two-way",), 2, "test", mirrored=True))
    assert len(plain) == len(mirrored) == 8
    for a, b in zip(plain, mirrored, strict=True):
        assert (a.question, a.options, a.relation) == (b.question, b.options, b.relation)
        assert np.array_equal(np.asarray(a.image)[:, ::-1], np.asarray(b.image))
        expected = {"left": "right", "right": "left"}.get(a.truth, a.truth)
        assert a.truth == a.relation and b.truth == expected and b.truth in b.options


def test_questions_name_their_options_in_order_and_never_tell_the_answer():
    for seed in range(20):
        for item in make_set(seed):
            for form, count in (("two-way", 2), ("four-way", 4)):
                text, options = question(item, form)
                assert len(options) == count and item.relation in options
                places = [text.index(f" {option}") for option in options]
                assert places == sorted(places)
        texts = {form: {question(i, form)[0] for i in make_set(seed)} for form in ("two-way", "four-way")}
        assert len(texts["four-way"]) == 1 and len(texts["two-way"]) == 2


def test_splits_have_no_picture_in_common_and_training_shows_no_picture_of_neither():
    study = small_study(sft_sets=3)
    splits = [
        {i.image.tobytes() for i in draw_items(CONDITIONS[0], ("two-way",), 3, s)} for s in ("validation", "test")
    ]
    rows = training_rows(study)
    assert len(rows) == 3 * 4 * 2
    trained = {row["images"][0].tobytes() for row in rows}
    assert not splits[0] & splits[1] and not (splits[0] | splits[1]) & trained
    assert {row["images"][0].size for row in rows} == {(96, 96)}
    answers = [row["messages"][1]["content"][0]["text"] for row in rows]
    assert all(answers.count(relation) == 6 for relation in RELATIONS)


def test_pictures_have_the_size_of_their_condition():
    item = placed(make_set(0), CONDITIONS[2], 0)[0]
    assert picture(item, CONDITIONS[2]).size == (150, 60) and CONDITIONS[2].area == 150 * 60


# --- controls

FACTORS = st.lists(st.floats(1.0, 100.0), min_size=2, max_size=20).map(np.array)


@given(FACTORS, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_permuted_factors_are_the_same_elsewhere(factors, draw):
    found = permuted(factors, draw)
    assert sorted(found) == sorted(factors)
    assert np.ptp(factors) == 0 or not np.array_equal(found, factors)


@given(FACTORS, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_random_factors_change_the_frequencies_as_much(factors, draw):
    frequencies = 10_000.0 ** -(np.arange(len(factors)) / len(factors))
    found = random_of_equal_norm(factors, frequencies, draw)
    change = np.linalg.norm(frequencies * (factors - 1))
    assert np.linalg.norm(frequencies * (found - 1)) == pytest.approx(change)
    assert (found >= 1).all()


def test_high_frequencies_get_what_low_ones_had():
    factors, ratios = np.array([1.0, 2.0, 5.0]), np.array([0.0, 0.3, 0.6])
    assert reversed_factors(factors, ratios).tolist() == [5, 2, 1]
    shuffled = np.array([2, 0, 1])
    assert reversed_factors(factors[shuffled], ratios[shuffled]).tolist() == [1, 5, 2]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_control_can_be_applied_and_sets_the_frequencies_it_says(new_tiny_model, family):
    model = new_tiny_model(family).model
    frequencies, ratios = tower_frequencies(model)
    scaling = RopeScaling.from_any("poly:9:2")
    others = {"rebase": RopeScaling.from_any("exp:5"), "lowered": RopeScaling.from_any("exp:0.5")}
    g = factors_of(scaling, ratios)
    assert g == pytest.approx(1 + 9 * ratios**2)
    for arm in TUNED_ARMS:
        own = control_settings(arm, scaling, others, model)
        assert json.loads(json.dumps(own)) == own
        apply_rope_scaling(model, own)
        if arm in ("permuted", "high-frequency"):
            now, _ = tower_frequencies(model)
            assert sorted(np.broadcast_to(now, (2, len(g)))[0] / frequencies) == pytest.approx(sorted(g), rel=1e-5)
        apply_rope_scaling(model, None)
    assert control_settings("h-only", scaling, others, model)["axes"] == "h"
    with pytest.raises(ValueError, match="magic"):
        control_settings("magic", scaling, others, model)


def test_a_model_without_a_tower_to_scale_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no vision tower with an axial"):
        tower_frequencies(tiny_model("llava").model)


# --- units


def test_a_killed_run_does_only_what_is_left(tmp_path, monkeypatch):
    study, done = small_study(), []

    def do(self, unit):
        if len(done) == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        done.append(unit.name)
        path = unit.path(self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")

    monkeypatch.setattr(Workbench, "do", do)
    units = grid_units(study)
    with pytest.raises(KeyboardInterrupt):
        run_units(study, tmp_path, units)
    (tmp_path / "again").touch()
    run_units(study, tmp_path, units)
    run_units(study, tmp_path, units)
    assert done == [unit.name for unit in units] and len(units) == 2


def test_units_have_files_of_their_own_and_main_arms_come_first(new_tiny_model):
    study = small_study(seeds=2, draws=2, tuned_arms=("stock", "scaled", "table"))
    choice = {"plain": "poly:9:2", "tuned": "poly:99:8", "rebase": "exp:2"}
    units = arm_units(study, choice, new_tiny_model("qwen2_vl").model)
    assert len({unit.name for unit in units}) == len(units) == 8 + 2 + 3 * 2
    assert [unit.arm for unit in units][:6] == ["stock", "scaled", "stock", "stock", "scaled", "scaled"]
    by_arm = {(unit.arm, unit.tuned): json.loads(unit.scaling) for unit in units if unit.scaling}
    assert by_arm["scaled", False]["alpha"] == 9 and by_arm["scaled", True]["alpha"] == 99


def test_fine_tuning_sees_the_resolution_of_the_questions_and_the_scaling(tmp_path):
    config = sft_config(small_study(), tmp_path, {"type": "poly", "alpha": 9.0, "p": 2.0}, 7)
    assert (config.min_pixels, config.max_pixels, config.seed) == (60 * 150, 96 * 96, 7)
    assert config.rope_scaling == {"type": "poly", "alpha": 9.0, "p": 2.0}


def test_latency_gives_ratios_with_their_spread(tiny_model):
    tiny = tiny_model("qwen2_vl")
    found = measure_latency(tiny.model, tiny.inputs(["titt"]), "poly:9:2", rounds=6, warmup=1)
    for name in ("scaled_to_stock", "stock_to_stock"):
        ratio = found[name]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        assert ratio["quartile_1"] <= ratio["value"] <= ratio["quartile_3"]
    with pytest.raises(ValueError, match="rounds=1"):
        measure_latency(tiny.model, tiny.inputs(["titt"]), "poly:9:2", rounds=1)


# --- the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study at its smallest: its folder, its configuration and what the command printed."""
    folder = tmp_path_factory.mktemp("study")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    arguments = ["study", "rope-scaling", "--config", str(config), "--out", str(folder / "out")]
    assert main([*arguments, "--latency", "--rounds", "2"]) == 0
    return folder / "out", arguments


@pytest.mark.slow
def test_the_command_leaves_answers_summary_report_and_figures(finished):
    import pyarrow.parquet as pq

    out, _ = finished
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    answers = pq.read_table(out / "answers.parquet").to_pylist()
    arms = {(row["arm"], row["tuned"]) for row in answers}
    assert arms == {("stock", False), ("scaled", False), ("permuted", False), ("stock", True), ("scaled", True)}
    spatial = [row for row in answers if row["part"] == "spatial"]
    assert len(spatial) == 5 * 2 * 4 * 2 * 3 and len(answers) == len(spatial) + 5 * 3
    # A figure of the summary, counted again from the answers.
    own = [r for r in spatial if r["arm"] == "scaled" and r["tuned"] and not r["mirrored"]]
    own = [r for r in own if (r["condition"], r["form"]) == ("wide", "two-way")]
    arm = next(a for a in summary["arms"] if a["arm"] == "scaled" and a["tuned"])
    assert arm["accuracy"]["wide"]["two-way"]["individual"]["value"] == np.mean([r["correct"] for r in own])
    report = (out / "report.md").read_text(encoding="utf-8")
    assert summary["sentence"] in report and "74.61 / 53.16" in report and "published" in report
    assert summary["latency"]["rounds"] == 2 and "stock to stock again" in report
    assert all((out / name).stat().st_size > 10_000 for name in ("grid.png", "arms.png"))
    assert summary["manifest"]["weights"] and summary["manifest"]["versions"]["torch"]


@pytest.mark.slow
def test_continuing_does_only_what_is_missing_and_ends_the_same(finished, capsys):
    out, arguments = finished
    before = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    missing = out / "answers" / "plain-permuted-0.parquet"
    times = {
        path: path.stat().st_mtime_ns
        for path in out.glob("*/*.*")
        if path.parent.name in runs.GRID or path.suffix == ".parquet"
    }
    missing.unlink()
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed)["sentence"] == before["sentence"]
    again = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {missing}
    after = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert after["arms"] == before["arms"] and after["findings"] == before["findings"]


@pytest.mark.slow
def test_a_report_of_what_is_there_names_what_is_not_run(finished):
    out, arguments = finished
    missing = out / "answers" / "plain-permuted-0.parquet"
    kept = missing.read_bytes()
    missing.unlink()
    try:
        assert main([*arguments, "--report-only"]) == 0
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        assert not missing.exists() and summary["not_run"] == [{"arm": "permuted", "tuned": False}]
        assert "Not run: +permuted." in (out / "report.md").read_text(encoding="utf-8")
        assert all(arm["arm"] != "permuted" for arm in summary["arms"])
    finally:
        missing.write_bytes(kept)
    stock = out / "answers" / "plain-stock-0.parquet"
    stock.rename(stock.with_suffix(".away"))
    assert main([*arguments, "--report-only"]) == 2
    stock.with_suffix(".away").rename(stock)


@pytest.mark.slow
def test_the_choice_hangs_on_validation_pictures_alone(finished):
    """Worse test answers change no choice; a grid measured on test pictures is refused."""
    out, _ = finished
    study = read_study(out.parent / "tiny.yaml")
    for path in (out / "grid").glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["split"] == "validation"
    choice, _ = command.choose_scalings(study, out, 1)
    assert choice == json.loads((out / "choice.json").read_text(encoding="utf-8"))
    path = next(p for p in (out / "grid").glob("*.json") if p.stem != "stock")
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace('"validation"', '"test"'), encoding="utf-8")
        with pytest.raises(ValueError, match="'test'"):
            command.choose_scalings(study, out, 1)
    finally:
        path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_a_folder_of_another_study_is_refused(finished, capsys):
    _, arguments = finished
    assert main([*arguments, "--limit", "1"]) == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--limit", "--workers"])
def test_numbers_below_one_are_refused(tmp_path, capsys, option):
    assert main(["study", "rope-scaling", "--out", str(tmp_path / "x"), option, "0"]) == 2
    assert f"{option} 0" in capsys.readouterr().err
