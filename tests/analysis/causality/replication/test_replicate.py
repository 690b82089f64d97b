"""A replication on a few scenes: both protocols, what they share and where they part; tables on planted rows."""

import json

import pyarrow as pa
import pytest

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject, open_annotated
from dualstream.analysis.causality.ablations.replacement import collect_reference
from dualstream.analysis.causality.lenses.lens_correspondence import ClassVocabulary
from dualstream.analysis.causality.replication.neo2024 import cells_of_object
from dualstream.analysis.causality.replication.protocols import Compatible, Corrected, Options
from dualstream.analysis.causality.replication.replicate_report import format_report
from dualstream.analysis.causality.replication.replicate_rows import (
    NO_GRID,
    NO_OBJECT,
    PASSED,
    SCHEMA,
    Bench,
    replicate_picture,
)
from dualstream.analysis.causality.replication.replicate_summary import summarize
from dualstream.analysis.object_tokens import object_tokens
from dualstream.cli import main
from dualstream.modeling import load_model
from dualstream.processing import register_processors, token_geometry

OPTIONS = Options(random_counts=(5,), draws=2, ig_steps=2, max_new_tokens=24)


@pytest.fixture(scope="module")
def scenes():
    return open_annotated("scenes:validation:12:183")


def make_bench(name, scenes, options=OPTIONS):
    register_processors()
    model, processor = load_model(name, device="cpu")
    reference = collect_reference(model, processor, scenes[:4])
    vocabulary = ClassVocabulary(processor.tokenizer, len(model.get_output_embeddings().weight))
    return Bench(model, processor, reference, vocabulary, options=options)


@pytest.fixture(scope="module")
def bench(scenes):
    return make_bench("tiny-llava", scenes)


@pytest.fixture(scope="module")
def table(bench, scenes):
    return pa.concat_tables([replicate_picture(bench, image) for image in scenes])


def chosen(table, **wanted):
    return [row for row in table.to_pylist() if all(row[key] == value for key, value in wanted.items())]


def test_both_protocols_follow_their_rules(table, bench, scenes):
    assert table.schema == SCHEMA
    taken = {row["image"] for row in chosen(table, experiment="lens")}
    assert taken
    for image in scenes:
        small = len(image.objects) <= 3
        for name in ("compatible", "corrected"):
            first = chosen(table, image=image.name, protocol=name, experiment="selection")
            if not small:
                assert [row["condition"] for row in first] == [NO_OBJECT]
            for row in first:
                if row["condition"] == PASSED and row["setting"] == "description":
                    rules = (Compatible if name == "compatible" else Corrected)(OPTIONS)
                    item = rules.object_of(image.objects)
                    exact = object_tokens(token_geometry(bench.processor, (183, 183)), item.mask)
                    own = exact if name == "corrected" else cells_of_object(item, (183, 183), 8)
                    assert row["tokens"] == own.tolist()


def test_conditions_controls_and_cells_of_the_table(table):
    conditions = {
        name: {row["condition"] for row in chosen(table, protocol=name, experiment="ablation")}
        for name in ("compatible", "corrected")
    }
    shared = {"none", "object", "object+1", "object+2", "register", "random-5", "ig-5"}
    assert conditions["compatible"] == shared and conditions["corrected"] == shared | {"moved", "moved+1"}
    image = chosen(table, experiment="knockout")[0]["image"]
    for name in ("compatible", "corrected"):
        cells = chosen(table, protocol=name, experiment="knockout", image=image)
        assert len(cells) == 37 and len({(row["condition"], row["window"]) for row in cells}) == 37
        assert len(chosen(table, protocol=name, experiment="lens", image=image)) == 6
    draws = chosen(table, protocol="corrected", experiment="ablation", condition="random-5", setting="polling")
    assert {row["draw"] for row in draws} == {0, 1}
    moved = chosen(table, protocol="corrected", experiment="ablation", condition="moved", setting="polling")
    own = {
        row["image"]: set(row["tokens"])
        for row in chosen(table, protocol="corrected", experiment="ablation", condition="object", setting="polling")
    }
    for row in moved:
        assert len(row["tokens"]) == len(own[row["image"]]) and not set(row["tokens"]) & own[row["image"]]


def test_windows_differ_and_the_whole_stack_does_not(table):
    """All layers are cut in both protocols; where their object sets agree, so do the probabilities."""
    for name, other in (("compatible", "corrected"),):
        for image in {row["image"] for row in chosen(table, experiment="knockout")}:
            wanted = {"image": image, "experiment": "selection", "setting": "vqa"}
            mine, theirs = (chosen(table, protocol=p, **wanted)[0]["tokens"] for p in (name, other))
            cells = {"image": image, "experiment": "knockout", "window": "all", "condition": "visual->last-row"}
            a, b = (chosen(table, protocol=p, **cells)[0]["probability"] for p in (name, other))
            assert a == pytest.approx(b, abs=1e-5)  # this route does not depend on the object
            if mine == theirs:
                cells["condition"] = "object->last"
                a, b = (chosen(table, protocol=p, **cells)[0]["probability"] for p in (name, other))
                assert a == pytest.approx(b, abs=1e-5)


def test_norming_twice_changes_the_last_entry_alone(bench, scenes, table):
    same_tokens = 0
    for image in {row["image"] for row in chosen(table, experiment="lens")}:
        sets = [chosen(table, image=image, protocol=p, experiment="selection")[0]["tokens"]
                for p in ("compatible", "corrected")]  # fmt: skip
        if sets[0] != sets[1]:
            continue
        same_tokens += 1
        shares = [
            [row["share"] for row in chosen(table, image=image, protocol=p, experiment="lens")]
            for p in ("compatible", "corrected")
        ]
        assert shares[0][:-1] == shares[1][:-1]
    assert same_tokens


def test_a_grid_that_is_no_square_ends_the_compatible_column_only(scenes):
    bench = make_bench("tiny-qwen2-vl", scenes)
    wide = AnnotatedImage(
        "wide",
        (AnnotatedObject("circle", (20, 20, 60, 58)),),
        lambda: scenes[0].image().resize((366, 183)),
        (366, 183),
    )
    found = replicate_picture(bench, wide).to_pylist()
    assert [row["condition"] for row in found if row["protocol"] == "compatible"] == [NO_GRID]
    assert any(row["experiment"] == "lens" for row in found if row["protocol"] == "corrected")


def planted(lost, kept, protocol="corrected"):
    """Rows of one setting: per picture the baseline and the object condition."""
    rows = []
    base = {"protocol": protocol, "experiment": "ablation", "setting": "polling", "window": "", "depth": -1, "draw": 0}
    for number in range(lost + kept):
        for condition, right in (("none", True), ("object", number >= lost), ("moved", True)):
            rows.append(
                {**base, "image": f"{number:03d}", "condition": condition, "correct": right, "other_scorer": right,
                 "tokens": [1, 2], "text": ""}
            )  # fmt: skip
    rows.append(
        {**base, "image": "wrong", "condition": "none", "correct": False, "other_scorer": True, "tokens": []}
    )  # a wrong baseline counts for nothing but accuracy over all
    rows.append(
        {**base, "image": "wrong", "condition": "object", "correct": False, "other_scorer": True, "tokens": [1]}
    )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_figures_on_planted_rows():
    summary = summarize(planted(30, 10))
    row = next(row for row in summary["ablation"]["corrected"] if row["condition"] == "object")
    assert row["destroyed"]["value"] == 0.75 and row["destroyed"]["n"] == 40 and row["published"] == 15.38
    assert row["control"] == "moved" and row["p_value"] < 0.001 and row["p_holm"] == row["p_value"]
    assert row["accuracy_over_all"] == pytest.approx(10 / 41)
    assert summary["scorers"][0] == {
        "setting": "polling", "texts": 122, "only_compatible": 2, "only_corrected": 0,
        "differ": summary["scorers"][0]["differ"],
    }  # fmt: skip
    assert summary["lens"]["corrected"] is None and summary["knockout"]["compatible"] == []
    nothing = summarize(planted(0, 20))
    row = next(row for row in nothing["ablation"]["corrected"] if row["condition"] == "object")
    assert row["destroyed"]["value"] == 0 and row["destroyed"]["high"] > 0.1 and row["p_value"] == 1


def test_command_resumes_and_ends_with_the_same_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dualstream.analysis.causality.replication.replicate.REFERENCE_PICTURES", 4)

    def run(folder, limit):
        arguments = ["--split", "validation", "--limit", str(limit), "--max-new-tokens", "16", "--json"]
        return main(["analyze", "replicate", "neo2024", "--out", str(folder), *arguments])

    assert run(tmp_path / "whole", 4) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["summary"]["pictures"] == 4
    assert run(tmp_path / "cut", 2) == 0
    next((tmp_path / "cut" / "rows").glob("*.parquet")).unlink()
    assert run(tmp_path / "cut", 4) == 0
    for name in ("summary.json", "report.md", "replicate.png", "table.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    report = (tmp_path / "whole" / "report.md").read_text()
    for words in (
        "published",
        "compatible",
        "corrected",
        "23.7",
        "86.67",
        "0.82",
        *(f"| D{n} |" for n in range(1, 20)),
    ):
        assert words in report, words
    assert "nan" not in report
    capsys.readouterr()
    assert main(["analyze", "replicate", "neo2024", "--out", str(tmp_path / "x"), "--mean", "no.file", "--json"]) == 2
    assert "mean=" in json.loads(capsys.readouterr().out)["error"]


def test_a_report_without_any_object_still_says_why():
    rows = [
        {"image": "a", "protocol": name, "experiment": "selection", "setting": "", "condition": NO_OBJECT,
         "window": "", "draw": 0, "depth": -1}
        for name in ("compatible", "corrected")
    ]  # fmt: skip
    summary = summarize(pa.Table.from_pylist(rows, schema=SCHEMA))
    windows = {name: {"all": (0, 1)} for name in ("compatible", "corrected")}
    report = format_report({**summary, "model": "m", "data": "d", "split": "test", "windows": windows})
    assert NO_OBJECT in report and "No picture with a question" in report
