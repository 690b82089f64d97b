"""The command end to end: run folder, resuming, report, errors."""

import json
import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from dualstream.analysis.where.experiment import (
    EXPERIMENTS,
    SUITES,
    Finding,
    above,
    below,
    experiments_of,
    make_experiment,
)
from dualstream.analysis.where.report import format_page, format_report, markdown_table, shown
from dualstream.cli import main
from dualstream.eval.statistics import Estimate


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one suite."""
    folder = tmp_path_factory.mktemp("where") / "run"
    assert main(arguments(folder)) == 0
    return folder


def arguments(folder, *more):
    base = ["analyze", "where", "--suite", "geometry", "--model", "tiny-qwen2-vl", "--limit", "3"]
    return [*base, "--out", str(folder), "--json", *more]


def rows_of(folder):
    return {path.name: repr(pq.read_table(path).to_pylist()) for path in sorted(folder.glob("*/rows/*.parquet"))}


def test_a_run_leaves_report_summary_figures_and_rows(finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    experiment = summary["experiments"]["position_geometry"]
    assert {finding["verdict"] for finding in experiment["findings"]} <= {"yes", "no", "open"}
    for finding in experiment["findings"]:
        assert finding["estimate"]["low"] <= finding["estimate"]["value"] <= finding["estimate"]["high"]
        assert finding["control"] and finding["rule"]
    report = (finished / "report.md").read_text()
    assert all((finished / figure).is_file() and figure in report for figure in experiment["figures"])
    assert "12 pictures" in report and str(finished.parent) not in json.dumps(experiment)
    assert summary["manifest"]["weights"] and experiment["cost"]["seconds"] > 0


def test_json_is_all_there_is_on_stdout_and_rows_are_not_made_again(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/rows/*.parquet")}
    assert main(arguments(finished)) == 0
    payload = json.loads(capsys.readouterr().out)
    assert set(payload["experiments"]) == {"position_geometry"} and payload["report"].endswith("report.md")
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/rows/*.parquet")} == before


def test_a_killed_run_goes_on_and_ends_the_same(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    wanted = rows_of(finished)
    (folder / "position_geometry" / "complete.json").unlink()
    next(folder.glob("*/rows/llm.parquet")).unlink()
    assert main(arguments(folder)) == 0
    assert rows_of(folder) == wanted


def test_other_settings_need_another_folder(finished, capsys):
    assert main(arguments(finished, "--seed", "1")) == 2
    assert "seed" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--suite", "nothing"), "intervention"),
        (("--data", "coco"), "scenes and whatsup_b"),
        (("--limit", "1"), "at least 2"),
    ],
)
def test_errors_say_what_is_accepted(tmp_path, capsys, more, message):
    assert main(arguments(tmp_path / "run", *more)) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]
    assert not (tmp_path / "run").exists()


def test_finished_runs_side_by_side(finished, tmp_path, capsys):
    twin = tmp_path / "twin"
    shutil.copytree(finished, twin)
    assert (
        main(["analyze", "where", "--compare", str(finished), str(twin), "--out", str(tmp_path / "page"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["runs"] == ["run", "twin"]
    page = (tmp_path / "page" / "statements.md").read_text()
    assert "| run | twin |" in page and page.count("read linearly off the connector's output") == 2
    assert main(["analyze", "where", "--compare", str(tmp_path), "--out", str(tmp_path), "--json"]) == 2
    assert "no summary.json" in json.loads(capsys.readouterr().out)["error"]


def test_every_experiment_of_every_suite_can_be_made():
    assert set(experiments_of("all")) == {name for names in SUITES.values() for name in names} == set(EXPERIMENTS)
    for name in EXPERIMENTS:
        experiment = make_experiment(name)
        assert experiment.name == name and experiment.title and experiment.question
        json.dumps(experiment.settings())


def test_rules():
    low, high, wide = Estimate(0.1, 0.0, 0.2, 9), Estimate(0.9, 0.8, 1.0, 9), Estimate(0.5, 0.1, 0.9, 9)
    assert [above(each, 0.5) for each in (low, high, wide)] == ["no", "yes", "open"]
    assert [below(each, 0.5) for each in (low, high, wide)] == ["yes", "no", "open"]
    with pytest.raises(ValueError, match="yes, no, open"):
        Finding("x", low, "perhaps", "rule")


def toy_summary(verdict, value):
    finding = Finding(
        "Cats | dogs.", Estimate(value, value, value, 4), verdict, "rule", Estimate(0.0, -1.0, 1.0, 4), "null"
    )
    experiment = SimpleNamespace(title="E0", question="Why?")
    cost = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_process_mib": 5.0}
    return {
        "data": {
            "source": "whatsup_b",
            "stand_in_images": True,
            "pairs": 2,
            "calibration_pairs": 4,
            "left_out": ["a"],
        },
        "experiments": {
            "x": {
                "title": experiment.title,
                "question": experiment.question,
                "findings": [finding.to_dict()],
                "tables": [
                    {"title": "T", "columns": ["a", "b"], "rows": [["c", 0.123456], ["d", None]], "note": "N."}
                ],
                "figures": ["figures/x.png"],
                "cost": cost,
                "rows": 3,
            }
        },
        "skipped": {"attention_axes": "no rotary tower"},
        "manifest": {"model": "toy", "seed": 0, "command": "dualstream analyze where"},
    }


def test_a_report_says_what_was_rehearsed_and_what_was_not_run():
    text = format_report(toy_summary("no", 0.25))
    assert "say nothing of photographs" in text and "Not run on this model: attention axes (no rotary tower)." in text
    assert "Cats \\| dogs." in text and "**no**" in text and "0.25 [0.25, 0.25]" in text and "| c | 0.12 |" in text


def test_one_page_puts_runs_side_by_side():
    page = format_page({"one": toy_summary("no", 0.25), "two": toy_summary("yes", 0.5)})
    assert page.count("Cats") == 1 and "**no** 0.25" in page and "**yes** 0.50" in page and "| one | two |" in page


def test_cells():
    assert shown(Estimate(1.234, 1.0, 123.4, 3)) == "1.23 [1.00, 123]" and shown(None) == "" and shown(7) == "7"
    assert markdown_table([["a"], ["b|c"]]) == "| a |\n| --- |\n| b\\|c |"
