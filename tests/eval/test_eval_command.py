"""``dualstream eval`` from end to end on embedded models: results, resuming after a kill, every kind of bad input."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dualstream.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (pip install dualstream[eval])"
)
BASE = ("--suite", "scenes", "--tasks", "scenes_relation", "--limit", "4", "--batch-size", "4")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("DUALSTREAM_DATA", "DUALSTREAM_SCENES", "DUALSTREAM_STAND_IN_IMAGES"):
        monkeypatch.delenv(name, raising=False)


def evaluate(capsys, *arguments):
    status = main(["eval", *map(str, arguments), "--json"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1  # nothing but one object, whatever the harness prints
    return status, json.loads(lines[0])


def no_model(monkeypatch):
    def refuse(**arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dualstream.eval.suites.command.Views", refuse)


def figures(payload):
    """The summary without the times, which differ from run to run."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in payload["summary"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the payload of one run over two arms and two protocols."""
    out = tmp_path_factory.mktemp("finished")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    assert main(["eval", *BASE, "--arms", "rle,random@rle", "--out", str(out), "--json"]) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_results_are_those_of_a_plain_loop(finished, capsys):
    from dualstream.eval.arms import parse_arm
    from dualstream.eval.option_scores import option_log_likelihoods
    from dualstream.eval.spatial_tasks import make_docs, open_image
    from dualstream.modeling import load_model
    from dualstream.processing import answer_questions, register_processors

    out, payload = finished
    assert {path.name for path in out.iterdir()} >= {"cells", "table.md", "summary.json", "accuracy.png"}
    register_processors()
    model, processor = load_model("tiny-llava", device="cpu")
    os.environ["DUALSTREAM_SCENES"] = "4"
    try:
        written, compared = (make_docs("scenes_relation", protocol) for protocol in ("paper", "fair"))
    finally:
        del os.environ["DUALSTREAM_SCENES"]
    by = {(row["task"], row["arm"]): row for row in payload["summary"]}
    for name in ("none", "rle"):
        config = parse_arm(name).config
        answers = answer_questions(
            model,
            processor,
            [open_image(doc["image"]) for doc in written],
            [doc["prompt"] for doc in written],
            compression=config,
        )
        row = by["scenes_relation_paper", name]
        hits = [answer.text == doc["target"] for answer, doc in zip(answers, written, strict=True)]
        assert row["accuracy"]["value"] == np.mean(hits)
        kept = np.mean([1 - answer.kept_tokens / answer.visual_tokens for answer in answers])
        assert row["reduction_rate"]["value"] == pytest.approx(kept)

        images = [[open_image(doc["image"])] for doc in compared]
        scores = option_log_likelihoods(
            model, processor, images, [d["prompt"] for d in compared], [d["choices"] for d in compared], name
        )
        totals = {}
        for doc, score in zip(compared, scores, strict=True):
            total = totals.setdefault(doc["item"], (doc["answer"], np.zeros(len(doc["options"]))))[1]
            total[doc["shown"]] += score
        expected = np.mean([total.argmax() == answer for answer, total in totals.values()])
        assert by["scenes_relation_fair", name]["accuracy"]["value"] == expected
    assert (
        by["scenes_relation_fair", "random@rle"]["reduction_rate"]
        == by["scenes_relation_fair", "rle"]["reduction_rate"]
    )
    assert (
        by["scenes_relation_fair", "rle"]["kv_bytes"]["value"]
        < by["scenes_relation_fair", "none"]["kv_bytes"]["value"]
    )


def test_a_finished_run_is_read_again_without_a_model(finished, capsys, monkeypatch):
    out, payload = finished
    no_model(monkeypatch)
    status, again = evaluate(capsys, *BASE, "--arms", "none,rle,random@rle", "--out", out)
    assert status == 0
    assert again["summary"] == payload["summary"]
    assert main(["eval", *BASE, "--arms", "rle", "--out", str(out)]) == 0
    assert "### tiny-llava: scenes, paper" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_the_same(finished, tmp_path, capsys, monkeypatch):
    import dualstream.eval.suites.command as command

    real, calls = command.run_benchmark, []

    def run_and_die(*arguments):
        calls.append(arguments[2].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(command, "run_benchmark", run_and_die)
    options = (*BASE, "--arms", "rle,random@rle", "--out", tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        main(["eval", *map(str, options)])
    capsys.readouterr()
    assert len(list((tmp_path / "run").rglob("cells/**/*.json"))) == 3
    status, payload = evaluate(capsys, *options)
    assert status == 0
    assert len(calls) == 4 + 3  # the three that were missing, and nothing twice
    assert figures(payload) == figures(finished[1])


def test_an_arm_and_a_model_can_be_added(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cells").rglob("*.json")}
    options = ("--arms", "rle,pool2x2", "--model", "tiny-llava", "tiny-qwen2-vl", "--out", tmp_path / "run")
    status, payload = evaluate(capsys, *BASE, *options)
    assert status == 0
    assert {(row["model"], row["arm"]) for row in payload["summary"]} == {
        (model, arm) for model in ("tiny-llava", "tiny-qwen2-vl") for arm in ("none", "rle", "pool2x2")
    }
    assert {path: path.stat().st_mtime_ns for path in before} == before
    text = (tmp_path / "run" / "table.md").read_text()
    assert "### tiny-qwen2-vl: scenes, fair" in text
    assert str(tmp_path) not in text + (tmp_path / "run" / "summary.json").read_text().replace(
        payload["manifest"]["command"], ""
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "scenery"), "suite 'scenery' is unknown"),
        (("--suite", "scenes", "--tasks", "scenes_smell"), "scenes_smell is not in suite scenes"),
        (("--suite", "scenes", "--arms", "none,rlee"), "arm 'rlee' is unknown"),
        (("--suite", "scenes", "--arms", "random@2"), "needs a budget"),
        (("--suite", "scenes", "--limit", "0"), "--limit is 0"),
        (("--suite", "scenes", "--batch-size", "0"), "--batch-size is 0"),
        (("--suite", "scenes", "--model", "tiny-llava", "tiny-llava"), "names a model twice"),
        (("--suite", "table2", "--tasks", "vsr_random"), "set DUALSTREAM_DATA"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(options, message, tmp_path, capsys, monkeypatch):
    no_model(monkeypatch)
    status, payload = evaluate(capsys, *options, "--out", tmp_path / "run")
    assert status == 2
    assert message in payload["error"]
    assert not (tmp_path / "run").exists()


def whats_up_b(folder, items=408, pictures=True):
    """A What's Up B folder of grey pictures."""
    place = folder / "whatsup" / "controlled_clevr"
    place.mkdir(parents=True)
    relations = ("left_of", "right_of", "in-front_of", "behind")
    words = ("to the left of", "to the right of", "in front of", "behind")
    rows = []
    for number in range(items):
        things = (f"thing{number // 4}", f"other{number // 4}")
        name = f"{things[0]}_{relations[number % 4]}_{things[1]}.jpeg"
        captions = [f"A {things[0]} {words[(number + k) % 4]} a {things[1]}" for k in range(4)]
        rows.append({"image_path": f"data/controlled_clevr/{name}", "caption_options": captions})
        if pictures:
            Image.new("RGB", (40, 30), "grey").save(place / name)
    (folder / "whatsup" / "controlled_clevr_dataset.json").write_text(json.dumps(rows))
    return folder


def test_missing_pictures_and_half_a_download_are_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    no_model(monkeypatch)
    options = ("--suite", "table2", "--tasks", "whatsup_b", "--limit", "4", "--out", tmp_path / "run")
    data = whats_up_b(tmp_path / "data")
    monkeypatch.setenv("DUALSTREAM_DATA", str(data))
    file = data / "whatsup" / "controlled_clevr_dataset.json"
    whole = file.read_text()

    def error():
        status, payload = evaluate(capsys, *options)
        assert status == 2
        assert not (tmp_path / "run").exists()
        return payload["error"]

    file.write_text(whole[: len(whole) // 2])
    assert "is the download complete?" in error()
    file.write_text(json.dumps(json.loads(whole)[:100]))
    assert "has 100 items, the complete benchmark has 408" in error()
    file.write_text(whole)
    next((data / "whatsup" / "controlled_clevr").iterdir()).unlink()
    assert "1 of 408 pictures are not in" in error()
    shutil.rmtree(data / "whatsup" / "controlled_clevr")
    assert "no picture folder" in error()


def test_pairs_and_sets_of_a_benchmark_with_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DUALSTREAM_DATA", str(whats_up_b(tmp_path / "data")))
    status, payload = evaluate(
        capsys,
        "--suite",
        "table2",
        "--tasks",
        "whatsup_b_fair",
        "--limit",
        "4",
        "--arms",
        "rle",
        "--out",
        tmp_path / "run",
    )
    assert status == 0
    assert [(row["arm"], row["items"], row["set"]["n"]) for row in payload["summary"]] == [
        ("none", 4, 1),
        ("rle", 4, 1),
    ]


def test_results_of_other_settings_are_not_mixed_in(finished, capsys, monkeypatch):
    no_model(monkeypatch)
    for changed in (("--limit", "8"), ("--batch-size", "2"), ("--dtype", "bfloat16")):
        status, payload = evaluate(capsys, *BASE, *changed, "--out", finished[0])
        assert status == 2
        assert "give another --out" in payload["error"]


@pytest.mark.parametrize("fault", ["lost", "error"])
def test_an_answer_that_is_lost_is_an_error_and_leaves_nothing_that_looks_finished(
    fault, tmp_path, capsys, monkeypatch
):
    import lmms_eval.evaluator

    real = lmms_eval.evaluator.simple_evaluate

    def faulty(*arguments, **options):
        if fault == "error":
            raise ValueError("out of memory")
        results = real(*arguments, **options)
        for samples in results["samples"].values():
            samples.pop()
        return results

    monkeypatch.setattr(lmms_eval.evaluator, "simple_evaluate", faulty)
    status, payload = evaluate(capsys, *BASE, "--arms", "none", "--out", tmp_path / "run")
    assert status == 2
    assert payload["error"].startswith("out of memory" if fault == "error" else "scenes_relation_fair: ")
    assert not list((tmp_path / "run").rglob("*.json")) if (tmp_path / "run").exists() else True


def test_without_the_harness_the_error_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, payload = evaluate(capsys, *BASE, "--out", tmp_path / "run")
    assert status == 2
    assert "pip install 'dualstream[eval]'" in payload["error"]


def test_two_processes_give_the_same_figures(finished, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    command += ["-m", "dualstream.cli", "eval", *BASE, "--arms", "rle,random@rle", "--out", str(out), "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(printed) == 1
    assert figures(json.loads(printed[0])) == figures(finished[1])
