"""The ablation experiment on every family, its rows, its command and its figures; resuming (T3, T14, T17)."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dualstream.analysis.annotated_images import open_annotated
from dualstream.analysis.causality.ablations.ablate import arms_of
from dualstream.analysis.causality.ablations.ablation import AblationPlan, Arm, ablate_targets, open_picture
from dualstream.analysis.causality.ablations.replacement import collect_reference
from dualstream.analysis.causality.settings import answer, answer_forward, prepare, query_of
from dualstream.analysis.causality.targets import select_targets
from dualstream.cli import main
from dualstream.modeling import load_model
from dualstream.modeling.families import FAMILIES

PLAN = AblationPlan(counts=(3,), draws=1, ig_steps=2, max_new_tokens=3, arms=(Arm(), Arm("zero"), Arm("mean", 1)))


@pytest.fixture(scope="module")
def targets():
    return select_targets(open_annotated("scenes:test:10")).targets


@pytest.fixture(scope="module")
def runs(tiny_model, publishing, targets):
    """Function family -> model, processor, pictures, reference and rows of the plan."""
    known = {}

    def get(name):
        if name not in known:
            model, processor = tiny_model(name).model, publishing.make_processor(name)
            reference = collect_reference(model, processor, open_annotated("scenes:validation:6"), PLAN.depths)
            pictures = [open_picture(processor, target) for target in targets[:3]]
            rows = ablate_targets(model, processor, pictures, PLAN, reference)
            known[name] = model, processor, pictures, reference, rows
        return known[name]

    return get


def by_key(rows):
    found = {}
    for row in rows:
        key = (
            row["image"],
            row["setting"],
            row["condition"],
            row["draw"],
            row["method"],
            row["replacement"],
            row["depth"],
        )
        assert key not in found
        found[key] = row
    return found


def same(one, other):
    for name in ("text", "correct", "abstained", "tokens"):
        assert one[name] == other[name]
    for name in ("probability", "rank", "margin"):
        assert np.isclose(one[name], other[name], atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_baseline_is_the_plain_model(name, runs):
    model, processor, pictures, _, rows = runs(name)
    rows = by_key(rows)
    for setting, ask, method in (("generative", answer, "generate"), ("vqa", answer, "generate"),
                                 ("polling", answer_forward, "first-token")):  # fmt: skip
        limit = 3 if setting == "generative" else None
        for picture in pictures:
            query = query_of(picture.target, setting, max_new_tokens=limit)
            inputs = prepare(processor, [picture.image], [query])
            (outcome,) = ask(model, processor, inputs, [query])
            row = rows[picture.target.image.name, setting, "none", 0, method, "mean", -1]
            same(row, {**row, **outcome.to_dict()})


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_do_what_their_tokens_say(name, runs):
    """Nothing chosen: the baseline (T3). All replaced: the picture is hidden, deepstack included (T3b)."""
    model, processor, pictures, reference, rows = runs(name)
    rows = by_key(rows)
    names = {row["condition"] for row in rows.values()}
    assert {"object", "object+1", "object+2", "outside", "all", "register-norm", "ig-3", "random-3"} <= names
    for row in rows.values():
        assert row["n_tokens"] == len(row["tokens"]) == len(set(row["tokens"])) and row["n_tokens"] <= row["n_visual"]
        base = rows[row["image"], row["setting"], "none", 0, row["method"], row["replacement"], row["depth"]]
        if not row["tokens"]:
            same(row, base)
        if row["condition"] == "all" and row["method"] == "first-token":
            assert not np.isclose(row["margin"], base["margin"], atol=1e-6)
    assert {(row["replacement"], row["depth"]) for row in rows.values() if row["method"] == "first-token"} == {
        ("mean", -1), ("zero", -1), ("mean", 1)
    }  # fmt: skip
    picture, other = pictures[0], open_picture(processor, pictures[1].target)
    other.target = picture.target
    plan = replace(PLAN, settings=("vqa",), arms=(Arm(),), ig_steps=0)
    alone = [by_key(ablate_targets(model, processor, [each], plan, reference)) for each in (picture, other)]
    if len(picture.geometry) == len(other.geometry):
        key = picture.target.image.name, "vqa", "all", 0, "generate", "mean", -1
        same(alone[0][key], alone[1][key])
    for key, row in alone[0].items():  # a picture by itself answers as in a chunk
        same(row, rows[key])


def test_random_choices_follow_the_seed(runs):
    model, processor, pictures, reference, _ = runs("llava")
    small = replace(PLAN, settings=("vqa",), arms=(Arm(),), ig_steps=0)

    def tokens(seed):
        found = ablate_targets(model, processor, pictures[:1], replace(small, seed=seed), reference)
        return {row["condition"]: row["tokens"] for row in found}

    first, again, other = tokens(0), tokens(0), tokens(1)
    assert first == again and first["object"] == other["object"]
    assert first["random-like-object+1"] != other["random-like-object+1"]


def test_arms_are_read_and_checked():
    assert arms_of("mean,zero@2,mean@all", 3) == (
        Arm(),
        Arm("zero", 2),
        Arm("mean", 1),
        Arm("mean", 2),
        Arm("mean", 3),
    )
    with pytest.raises(ValueError, match="depth must be"):
        arms_of("mean@9", 3)
    with pytest.raises(ValueError, match="replacement='grey'"):
        AblationPlan(arms=arms_of("grey", 3))


COMMAND = ["analyze", "ablate", "--limit", "6", "--counts", "4", "--draws", "1", "--ig-steps", "2", "--json",
           "--arms", "mean,zero,mean@2", "--further-limit", "4", "--settings", "polling,vqa"]  # fmt: skip


def test_command_writes_everything_and_resumes_to_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dualstream.analysis.causality.experiment.PICTURES_PER_UNIT", 2)
    monkeypatch.setattr("dualstream.analysis.causality.ablations.ablate.REFERENCE_LIMIT", 20)
    out = tmp_path / "run"
    assert main([*COMMAND, "--out", str(out)]) == 0
    payload = json.loads(capsys.readouterr().out)
    names = ("summary.json", "report.md", "table.parquet", "destroyed.png", "dose.png", "depth.png")
    before = {name: (out / name).read_bytes() for name in names}
    found = payload["summary"]["settings"]["polling"]
    conditions = {entry["condition"]: entry for entry in found["conditions"]}
    assert conditions["object"]["images"] == 6 and conditions["ig-4"]["images"] == 4
    for entry in conditions.values():
        share = entry["destroyed"]
        assert share["low"] <= share["value"] <= share["high"] and entry["test"]["p_holm"] >= entry["test"]["p_value"]
    pairs = {(e["treatment"], e["control"]) for e in found["comparisons"]}
    assert {("object", "translated"), ("object+1", "ig-like-object+1")} <= pairs
    assert {arm["depth"] for arm in payload["summary"]["arms"]} == {-1, 2}
    assert payload["summary"]["attribution"]["prompts"] == 8
    assert payload["manifest"]["cost"]["pictures"] == 6 and payload["manifest"]["seed"] == 0
    assert str(tmp_path) not in before["report.md"].decode() + before["summary.json"].decode()
    sorted((out / "rows").glob("*.parquet"))[0].unlink()  # as if killed before the last unit was written
    assert main([*COMMAND, "--out", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in names} == before
    capsys.readouterr()
    assert main([*COMMAND, "--seed", "1", "--out", str(out)]) == 2
    assert "another configuration" in json.loads(capsys.readouterr().out)["error"]
    for option, message in ((["--counts", "x"], "counts='x'"), (["--arms", "mean@99"], "depth must be"),
                            (["--limit", "0"], "limit must be"), (["--area", "5"], "area='5'"),
                            (["--settings", "riddle"], "setting='riddle'")):  # fmt: skip
        assert main([*COMMAND, *option, "--out", str(tmp_path / "bad")]) == 2
        assert message in json.loads(capsys.readouterr().out)["error"]


def test_the_object_carries_the_answer_of_the_embedded_model(targets):
    """No figure is fixed here; only that removing the object hurts more than removing the same shape elsewhere."""
    model, processor = load_model("tiny-llava")
    reference = collect_reference(model, processor, open_annotated("scenes:validation:20"))
    pictures = [open_picture(processor, target) for target in targets]
    plan = AblationPlan(settings=("polling",), ig_steps=0, counts=(), rings=(0, 1))
    rows = ablate_targets(model, processor, pictures, plan, reference)
    margin = {name: np.mean([row["margin"] for row in rows if row["condition"] == name]) for name in
              ("none", "object+1", "translated+1")}  # fmt: skip
    assert margin["object+1"] < margin["translated+1"] <= margin["none"] + 1.0
