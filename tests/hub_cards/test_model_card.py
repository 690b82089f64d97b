"""Cards are made from files alone: metadata that huggingface_hub reads, the files' figures, and what is refused."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from dualstream import cli
from dualstream.eval.suites.summary import summarize as summarize_suite
from dualstream.hub_cards.result_files import portable
from dualstream.modeling import LlavaWithVisualDecoder, Qwen2VLWithVisualDecoder, default_model_path
from dualstream.processing import LlavaWithVisualDecoderProcessor, Qwen2VLWithVisualDecoderProcessor


def card(*arguments, capsys, status=0):
    assert cli.main(["card", *map(str, arguments), "--json"]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out)


def metadata(folder):
    """What huggingface_hub's own class reads, which raises on anything it does not understand."""
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data


@pytest.fixture
def embedded(tmp_path):
    return Path(shutil.copytree(default_model_path("tiny-llava"), tmp_path / "tiny-llava"))


@pytest.fixture
def ours(tmp_path):
    """A scaled and compressing Qwen2-VL."""
    folder, source = tmp_path / "reads", default_model_path("tiny-qwen2-vl")
    Qwen2VLWithVisualDecoder.from_pretrained(source, vision_rope_scaling="poly:99:8").save_pretrained(folder)
    Qwen2VLWithVisualDecoderProcessor.from_pretrained(source, compression="rle").save_pretrained(folder)
    return folder


def suite_of(models, folder, **manifest):
    """What ``dualstream eval`` writes, from made-up answers, through its own summary."""
    from dualstream.eval.suites.benchmarks import Benchmark

    task = Benchmark("gqa", "table1", "exact_match", "imageId")

    def cell(right):
        items = [
            {
                "item": str(n), "cluster": f"image {n // 2}", "score": float(n < right), "prompt_tokens": 100,
                "visual_tokens": 64, "kept_tokens": 64 - 8 * (right != 30),
            }
            for n in range(40)
        ]  # fmt: skip
        return {"items": items, "kv_bytes_per_token": 1000, "batch_seconds": [0.1, 0.2]}

    cells = {(name, arm, "gqa"): cell(right) for name in models for arm, right in (("none", 30), ("rle", 28))}
    versions = {"dualstream": "0.1.0"}
    facts = {"command": "dualstream eval --suite table1", "versions": versions, "limit": 40, "lmms_eval": "0.7.3"}
    content = {"summary": summarize_suite(cells, [task]), "manifest": {**facts, **manifest}}
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def test_the_card_of_an_embedded_model_has_the_figures_of_its_files_and_no_others(embedded, capsys):
    payload = card(embedded, capsys=capsys)
    assert payload["results"] == ["Scene questions", "Visual decoder"]
    arms = {row["arm"]: row for row in json.loads((embedded / "evaluation.json").read_text())["arms"]}
    data = metadata(embedded)
    found = {entry.metric_name: entry for entry in data.eval_results}
    for name in ("full", "rle", "rle_drop_top1", "rle_drop_top2"):
        figure, entry = arms[name]["accuracy"], found[f"accuracy, {name}"]
        assert entry.metric_value == round(100 * figure["value"], 1)
        assert entry.metric_args["n"] == figure["n"]
        assert entry.metric_args["low"] == round(100 * figure["low"], 1) <= entry.metric_value
    assert data.license == "apache-2.0" and data.model_name == "tiny-llava" and "dualstream" in data.tags
    text = (embedded / "README.md").read_text()
    count = arms["full"]["accuracy_by_kind"]["count"]
    assert f"| count | {count['n']} | {100 * count['value']:.1f} [{100 * count['low']:.1f}, " in text
    assert "](token_map.png)" in text and (embedded / "token_map.png").stat().st_size < 100_000
    assert not re.search(r"\n\n\n", text)


def test_the_snippet_of_a_card_runs(embedded, tmp_path, monkeypatch, capsys):
    from dualstream.data_builders.scenes import make_scene, render

    LlavaWithVisualDecoder.from_pretrained(embedded).save_pretrained(tmp_path / "ours")
    LlavaWithVisualDecoderProcessor.from_pretrained(embedded, compression="rle").save_pretrained(tmp_path / "ours")
    card(tmp_path / "ours", "--license", "mit", "--no-picture", capsys=capsys)
    text = (tmp_path / "ours" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(ast.parse(code).body) - 1 == 5 and max(map(len, code.splitlines())) < 110
    assert '"REPO_OR_FOLDER", trust_remote_code=True' in code
    monkeypatch.chdir(tmp_path)
    render(make_scene(1_100_000_003), 96).save("photo.jpg")
    exec(compile(code.replace("REPO_OR_FOLDER", str(tmp_path / "ours")), "card", "exec"), {})
    assert "What is this?" in capsys.readouterr().out


def test_settings_results_and_published_figures_of_a_model_of_ours(ours, tmp_path, capsys):
    base = "Qwen/Qwen2.5-VL-7B-Instruct"
    results = suite_of([str(ours), base], tmp_path / "eval", rope_scaling="poly:99:8")
    payload = card(
        ours, "--results", results, "--license", "apache-2.0", "--base-model", base, "--no-picture",
        "--eval-dataset", "gqa=lmms-lab/GQA:testdev", capsys=capsys,
    )  # fmt: skip
    text, data = (ours / "README.md").read_text(), metadata(ours)
    assert data.base_model == base and payload["metrics"] == 2
    assert "| compression, asked for by the processor | `rle` |" in text and "`poly:99:8`" in text
    assert "Published (not run here)" in text and "60.80" in text, "GQA under rle, arXiv 2509.19191"
    assert str(tmp_path) not in text and "reads: table1" in text and f"{base}, for comparison: table1" in text
    entry = next(e for e in data.eval_results if e.metric_name == "accuracy, rle")
    assert entry.metric_value == 70.0 and entry.metric_args["n"] == 20, "pictures, not questions, are independent"
    board = yaml.safe_load((ours / ".eval_results/dualstream.yaml").read_text())
    assert board[0]["dataset"] == {"id": "lmms-lab/GQA", "task_id": "testdev"} and board[0]["value"] == 75.0
    assert "Published figures were not run here" in text and "has 20 independent units" in text


def test_a_decoder_has_a_card_and_keeps_what_it_needs_from_an_earlier_one(tmp_path, capsys):
    folder, source = tmp_path / "decoder", Path(default_model_path("tiny-qwen2-vl"))
    folder.mkdir()
    for name in ("visual_decoder.json", "visual_decoder.safetensors", "distillation.json"):
        shutil.copy(source / name, folder)
    payload = card(folder, capsys=capsys)
    text, data = (folder / "README.md").read_text(), metadata(folder)
    assert payload["kind"] == "decoder" and payload["license"] == {"license": "apache-2.0"}
    assert data.library_name == "dualstream" and data.base_model is None, "an embedded model is none of the Hub"
    record = json.loads((folder / "distillation.json").read_text())
    top1 = record["figures"]["decoder"]["top1"]
    assert {e.metric_type: e.metric_value for e in data.eval_results}["top1"] == round(100 * top1["value"], 1)
    assert 'load_model("tiny-qwen2-vl", decoder=decoder)' in text
    card(folder, "--base-model", "Qwen/Qwen2-VL-2B-Instruct", "--license", "mit", "--no-picture", capsys=capsys)
    assert metadata(folder).base_model == "Qwen/Qwen2-VL-2B-Instruct"


def test_a_release_pins_the_card_it_was_made_with(ours, capsys):
    card(ours, "--license", "mit", "--no-picture", capsys=capsys)
    arguments = ["release", "model", str(ours), "someone/reads", "--dry-run", "--no-load", "--json"]
    assert cli.main(arguments) in (0, 2)
    problems = json.loads(capsys.readouterr().out).get("problems", [])
    assert not [problem for problem in problems if problem["refused"]]


def refusals(embedded, ours, tmp_path):
    """Name -> (arguments, part of the message)."""
    other = Path(default_model_path("tiny-qwen2-vl"))
    (tmp_path / "text.json").write_text('{"some": "thing"}')
    (tmp_path / "cut.json").write_text('{"summary": [')
    (tmp_path / "empty").mkdir()
    foreign = suite_of(["someone/else"], tmp_path / "foreign")
    scaled = suite_of([str(ours)], tmp_path / "scaled", rope_scaling="exp:2")
    plain = ("--license", "mit", "--no-picture")
    (embedded / "README.md").unlink()
    return {
        "missing": ((ours, "--results", tmp_path / "no.json", *plain), "is missing"),
        "missing in folder": ((ours, "--results", tmp_path / "empty", *plain), "is missing"),
        "no results": ((ours, "--results", tmp_path / "text.json", *plain), "is no result file"),
        "cut": ((ours, "--results", tmp_path / "cut.json", *plain), "is damaged"),
        "other model": ((ours, "--results", other / "evaluation.json", *plain), "results of 'tiny-qwen2-vl'"),
        "other decoder": ((embedded, "--results", other / "distillation.json", *plain), "another visual decoder"),
        "other suite": ((ours, "--results", foreign, *plain), "results of 'someone/else'"),
        "other scaling": ((ours, "--results", scaled, *plain), "RoPE scaling exp:2"),
        "renamed": ((Path(shutil.copytree(embedded, tmp_path / "mine")), *plain), "--name tiny-llava"),
        "no licence": ((ours, "--no-picture"), "--license"),
        "no licence of the base": (
            (ours, "--base-model", "nobody/model", "--no-picture"),
            "nobody/model is not known",
        ),
        "licence of another": ((ours, "--base-model", "tiny-llava", *plain), "contradicts"),
        "nameless licence": ((ours, "--license", "other", "--no-picture"), "--license-name"),
        "no model": ((tmp_path / "empty", *plain), "holds no config.json"),
        "no folder": ((tmp_path / "gone", *plain), "is no folder"),
        "board": ((ours, "--eval-dataset", "pope=lmms-lab/POPE", *plain), "was not measured"),
        "board's name": ((ours, "--eval-dataset", "pope", *plain), "TASK=OWNER/NAME"),
    }


def test_what_no_card_can_be_made_of_is_refused_and_leaves_the_folder_alone(embedded, ours, tmp_path, capsys):
    for name, (arguments, message) in refusals(embedded, ours, tmp_path).items():
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        refused = card(*arguments, capsys=capsys, status=2)
        assert message in refused["error"], (name, refused["error"])
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, name


def test_a_readme_by_hand_is_not_overwritten(ours, tmp_path, capsys):
    (ours / "README.md").write_text("---\nlicense: mit\n---\nWritten with care.\n")
    refused = card(ours, "--no-picture", capsys=capsys, status=2)
    assert "not written by dualstream" in refused["error"]
    card(ours, "--no-picture", "--out", tmp_path / "CARD.md", capsys=capsys)
    assert "license: mit" in (tmp_path / "CARD.md").read_text(), "an earlier card states the licence"


def test_commands_lose_the_folders_of_their_machine():
    shown = portable("dualstream eval --model '/mnt/disk 1/model' --out ~/out --suite scenes")
    assert shown == "dualstream eval --model model --out out --suite scenes"
    assert portable("it's cut") == portable(portable("it's cut"))
