"""The knockout table: a cached prefix changes nothing, on every family; the command, its files, resuming (T17)."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dualstream.analysis.annotated_images import open_annotated
from dualstream.analysis.causality.ablations.ablation import open_picture
from dualstream.analysis.causality.knockouts.knockout import Block, knockout, knockout_support
from dualstream.analysis.causality.knockouts.knockout_rows import (
    KnockoutPlan,
    cells_of,
    knockout_picture,
    prefill,
    rerun,
)
from dualstream.analysis.causality.knockouts.routes import ROUTES
from dualstream.analysis.causality.prompt_rows import prompt_rows
from dualstream.analysis.causality.targets import select_targets
from dualstream.analysis.interventions import encoded_images
from dualstream.cli import main
from dualstream.modeling import load_model
from dualstream.modeling.families import FAMILIES, family_of

IMAGE = 190


@pytest.mark.parametrize("name", [*FAMILIES, "llava_phi"])
def test_columns_computed_from_a_prefix_equal_a_whole_pass(name, tiny_model):
    model, make = tiny_model(name)
    inputs = make(["tttitttt"])
    with torch.no_grad():
        output = encoded_images(model, inputs)
        plain = prefill(model, prompt_rows(model, inputs, output, [0]))
        whole_logits = model(**inputs).logits[0, -1]
    assert torch.allclose(plain.logits, whole_logits, atol=1e-4)
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    length = inputs["input_ids"].shape[1]
    last, question = torch.tensor([length - 1]), torch.arange(int(image[-1]) + 1, length - 1)
    sets = [
        [],
        [Block(0, image, last)],
        [Block(0, image, question, layers=(0,))],
        [Block(0, image[:3], question), Block(0, question, last, layers=(1,), heads=(0, 2))],
        [Block(0, image[:2], image[4:])],
    ]
    for start in (0, int(image[1]), int(image[4]), int(question[0]), length - 1):
        fitting = [own for own in sets if all(int(block.destinations.min()) >= start for block in own)]
        logits, report = rerun(model, plain, start, fitting, verify=True)
        assert report.largest_blocked_weight == 0.0
        for own, found in zip(fitting, logits, strict=True):
            with torch.no_grad(), knockout(model, own):
                expected = model(**inputs).logits[0, -1]
            assert torch.allclose(found, expected, atol=2e-3, rtol=1e-3)
    assert plain.cache.get_seq_length() == length  # the cache of the plain pass is not used up
    if family_of(model).has_mrope:
        assert torch.isfinite(logits).all()


@pytest.fixture(scope="module")
def scene_pictures():
    """Function processor -> pictures of the first scenes with an object."""

    def get(processor, count=2):
        return [
            open_picture(processor, target)
            for target in select_targets(open_annotated("scenes:test:8")).targets[:count]
        ]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_every_route_on_every_family(name, tiny_model, publishing, scene_pictures):
    model, processor = tiny_model(name).model, publishing.make_processor(name)
    (picture,) = scene_pictures(processor, 1)
    plan = KnockoutPlan(settings=("vqa", "polling"), routes=ROUTES, windows="single")
    rows, reports = knockout_picture(model, processor, picture, plan)
    assert {row["setting"] for row in rows} == {"vqa", "polling"}
    routes = {row["route"] for row in rows}
    assert {"none", "object->last", "visual->visual", "object+1->question,last"} <= routes
    assert all(report.largest_blocked_weight == 0.0 for report in reports) and reports
    base = next(row for row in rows if row["route"] == "none" and row["setting"] == "vqa")
    cut = [row["margin"] for row in rows if row["route"] == "visual->question,last" and row["window"] == "all"]
    assert not np.isclose(cut[0], base["margin"], atol=1e-5)
    heads = KnockoutPlan(settings=("vqa",), routes=("object->last",), windows="all", each_head=True)
    rows, _ = knockout_picture(model, processor, picture, heads)
    assert [row["head"] for row in rows] == [-1, -1, 0, 1, 2, 3]


def test_a_whole_cut_hides_the_picture_and_late_cuts_of_the_question_do_not(scene_pictures):
    """On the embedded model: T4 through the experiment's own path."""
    model, processor = load_model("tiny-qwen2-vl")
    one, other = scene_pictures(processor, 2)
    plan = KnockoutPlan(settings=("vqa",), routes=("visual->question,last", "visual->last"), windows="all")
    support = knockout_support(model)
    rows = {}
    for picture in (one, other):
        picture.target = one.target  # the same question about both pictures
        rows[picture.image.tobytes()], _ = knockout_picture(model, processor, picture, plan)
    first, second = rows.values()
    margins = [[row["margin"] for row in own] for own in (first, second)]
    assert margins[0][1] == pytest.approx(margins[1][1], abs=1e-4)  # all routes cut
    assert abs(margins[0][0] - margins[1][0]) > 1e-3 and abs(margins[0][2] - margins[1][2]) > 1e-3
    assert support.cuttable == tuple(range(support.layers))


def test_cells_leave_out_what_does_not_exist(tiny_model):
    from dualstream.analysis.causality.knockouts.routes import Groups

    groups = Groups({"object": torch.tensor([4]), "last": torch.tensor([9])})
    support = knockout_support(tiny_model("llava").model)
    cells = cells_of(groups, KnockoutPlan(routes=("object->last", "translated->last"), windows="paper"), support)
    assert {cell.route for cell in cells} == {"object->last"} and len(cells) == 6
    with pytest.raises(ValueError, match="generative"):
        KnockoutPlan(settings=("generative",))


COMMAND = [
    "analyze",
    "knockout",
    "--limit",
    "20",
    "--routes",
    "object->last;translated+1->last;object+1->last",
    "--json",
]


def test_command_writes_everything_and_refuses_another_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*COMMAND, "--settings", "vqa", "--out", str(out)]) == 0
    payload = json.loads(capsys.readouterr().out)
    cells = payload["summary"]["settings"]["vqa"]["cells"]
    assert len(cells) == 18 and all(cell["images"] <= 20 for cell in cells)
    for cell in cells:
        kept = cell["destroyed"]
        assert kept["low"] <= kept["value"] <= kept["high"] and 0 <= cell["test"]["p_holm"] <= 1
        assert cell["test"]["p_holm"] >= cell["test"]["p_value"]
    assert payload["summary"]["probe"]["largest_blocked_weight"] == 0.0
    assert payload["summary"]["funnel"][-1]["left"] == 20
    for name in ("summary.json", "report.md", "manifest.json", "table.parquet", "routes-vqa.png"):
        assert (out / name).stat().st_size > 0
    report = (out / "report.md").read_text()
    assert "Holm" in report and str(tmp_path) not in report + (out / "summary.json").read_text()
    assert main([*COMMAND, "--settings", "polling", "--out", str(out)]) == 2
    assert "another configuration" in json.loads(capsys.readouterr().out)["error"]
    assert main([*COMMAND, "--settings", "riddle", "--out", str(tmp_path / "b")]) == 2
    assert "setting='riddle'" in json.loads(capsys.readouterr().out)["error"]


def test_killed_run_continues_to_identical_output(tmp_path, capsys):
    """T17, with a real kill."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["analyze", "knockout", "--limit", "40", "--routes", "object->last"]
    options += ["--windows", "single", "--settings", "vqa", "--out"]
    command = [sys.executable, "-m", "dualstream.cli", *options, str(broken)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not list((broken / "rows").glob("*.parquet")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 0 < len(list((broken / "rows").glob("*.parquet"))) < 4 and not (broken / "summary.json").exists()
    for folder in (broken, whole):
        assert main([*options, str(folder)]) == 0
    for name in ("summary.json", "report.md", "routes-vqa.png"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
