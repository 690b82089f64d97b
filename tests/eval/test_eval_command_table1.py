"""``dualstream eval --suite table1``: the harness's own tasks, on local data sets under the names it asks for."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from dualstream.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (pip install dualstream[eval])"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")  # the tasks ask for a token even where none is needed
    monkeypatch.chdir(tmp_path)


def evaluate(capsys, *arguments):
    status = main(["eval", "--suite", "table1", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


MIRROR = {
    "GQA": ("testdev_balanced_instructions", "testdev"),
    "textvqa": (None, "validation"),
    "MMBench": ("en", "dev"),
    "POPE": (None, "test"),
}


def mirror(folder):
    """Three questions of each benchmark of table 1, as local data sets under the names that the harness asks for."""
    from datasets import Dataset
    from datasets import Image as ImageColumn

    pictures = [Image.new("RGB", (64, 48), color) for color in ("red", "green", "blue")]
    rows = {
        "GQA": [{"id": str(n), "imageId": str(n // 2), "question": "Is it red?", "answer": "yes"} for n in range(3)],
        "textvqa": [
            {
                "question_id": n,
                "image_id": f"i{n}",
                "image": p,
                "question": "what is it?",
                "answers": ["red"] * 10,
                "ocr_tokens": [],
            }
            for n, p in enumerate(pictures)
        ],
        "MMBench": [
            {
                "index": n % 2 + 1_000_000 * (n // 2),
                "question": "What colour?",
                "hint": "nan",
                "answer": "A",
                "A": "red",
                "B": "green",
                "C": "nan",
                "D": "nan",
                "category": "colour",
                "L2-category": "attribute",
                "source": "own",
                "split": "dev",
                "image": p,
            }
            for n, p in enumerate(pictures)
        ],
        "POPE": [
            {
                "id": str(n),
                "question_id": str(n),
                "question": "Is there a circle in the image?",
                "answer": ("yes", "no")[n % 2],
                "image_source": f"p{n // 2}",
                "image": p,
                "category": "random",
            }
            for n, p in enumerate(pictures)
        ],
    }
    for name, (config, split) in MIRROR.items():
        place = folder / "lmms-lab-encoder" / name
        place.mkdir(parents=True)
        configs = [(config or "default", split, Dataset.from_list(rows[name]))]
        if name == "GQA":
            images = Dataset.from_list([{"id": str(n), "image": p} for n, p in enumerate(pictures)])
            configs.append(("testdev_balanced_images", split, images))
        lines = ["---", "configs:"]
        for config_name, split_name, dataset in configs:
            if "image" in dataset.column_names:
                dataset = dataset.cast_column("image", ImageColumn())
            dataset.to_parquet(place / f"{config_name}.parquet")
            lines += [f"- config_name: {config_name}", "  data_files:", f"  - split: {split_name}"]
            lines += [f"    path: {config_name}.parquet"]
        (place / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_table_1_runs_on_the_harness_s_own_tasks(tmp_path, capsys):
    mirror(tmp_path)
    status, payload = evaluate(capsys, "--arms", "rle", "--limit", "3", "--out", tmp_path / "run")
    assert status == 0, payload
    by = {(row["task"], row["arm"]): row for row in payload["summary"]}
    assert {task for task, _ in by} == {"gqa", "textvqa_val", "mmbench_en_dev_static", "pope", "mean"}
    assert by["gqa", "rle"]["accuracy"]["n"] == 2  # pictures
    assert by["mmbench_en_dev_static", "rle"]["items"] == 2  # a question and its rotation count once
    names = {"gqa": "exact_match", "textvqa_val": "exact_match", "pope": "pope_accuracy"}
    for task, metric in names.items():
        for arm in ("none", "rle"):
            harness = payload["harness"][f"tiny-llava/{arm}/{task}"]
            assert by[task, arm]["accuracy"]["value"] == pytest.approx(harness[f"{metric},none"])
    judged = payload["harness"]["tiny-llava/rle/mmbench_en_dev_static"]["gpt_eval_score,none"]
    assert by["mmbench_en_dev_static", "rle"]["accuracy"]["value"] == pytest.approx(judged / 100)
    assert {p["model"] for p in by["pope", "rle"]["published"]} == {
        "llava-hf/llava-1.5-7b-hf",
        "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    assert sorted(Path().glob("*")) == [Path("lmms-lab-encoder"), Path("run")]  # nothing strewn about


def test_data_that_cannot_be_opened_are_an_error_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    def refuse(**arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dualstream.eval.suites.command.Views", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the harness tries five times
    status, payload = evaluate(capsys, "--tasks", "pope", "--limit", "3", "--out", tmp_path / "run")
    assert status == 2
    assert payload["error"].startswith("pope: its data cannot be opened (")
