"""The page over the runs: figures come from the summaries, and every acceptance test it names exists."""

import json
import re
from pathlib import Path

import pytest

from dualstream.analysis.causality.study_page import main
from dualstream.cli import main as command

ROOT = Path(__file__).parents[3]
STUDY = ROOT / "docs" / "causality"


def test_every_acceptance_test_of_the_table_exists():
    table = (STUDY / "acceptance.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| T")]
    assert rows == ["T1", "T2", "T3", "T3b", *(f"T{number}" for number in range(4, 19))]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(named) == table.count("`tests/")
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "acceptance.md").write_text("| | what | tests |\n|---|---|---|\n")
    out = folder / "lens-tiny-llava"
    assert command(["analyze", "lens", "--data", "scenes:validation:6", "--out", str(out), "--json"]) == 0
    return folder


def test_the_page_holds_the_figures_of_the_summaries(folder):
    main([str(folder)])
    page = (folder / "report.md").read_text(encoding="utf-8")
    summary = json.loads((folder / "lens-tiny-llava" / "summary.json").read_text(encoding="utf-8"))
    share = summary["whole"]["object"]["best_depth"]["cross_fitted"]
    assert f"{100 * share['value']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]" in page
    assert "Not run: ablate of tiny-llava, knockout of tiny-llava, replicate of tiny-llava." in page
    assert "(lens-tiny-llava/report.md)" in page and "(lens-tiny-llava/lens.png)" in page
    cost = json.loads((folder / "lens-tiny-llava" / "manifest.json").read_text(encoding="utf-8"))["cost"]
    assert cost["pictures"] == 6 and f"| lens of tiny-llava | 6 | {cost['cpu_seconds']:.0f} |" in page


@pytest.mark.skipif(not (STUDY / "report.md").is_file(), reason="the study is not in this checkout")
def test_the_page_in_the_repository_is_that_of_its_files(tmp_path):
    for path in STUDY.glob("*-*/*.json"):
        copy = tmp_path / path.relative_to(STUDY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "acceptance.md").write_bytes((STUDY / "acceptance.md").read_bytes())
    main([str(tmp_path)])
    assert (tmp_path / "report.md").read_text() == (STUDY / "report.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", (STUDY / "report.md").read_text()):
        assert (STUDY / link).is_file(), link
