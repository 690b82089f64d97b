import json

import pytest

from dualstream.benchmarks import suites
from dualstream.cli import main

SMALL = [
    "bench",
    "--layers",
    "1",
    "--vision-layers",
    "1",
    "--text-tokens",
    "5",
    "--rounds",
    "2",
    "--reductions",
    "0.5",
    "--decoders",
    "pruned",
    "--device",
    "cpu",
]


def test_measures_records_and_reports(tmp_path, capsys):
    out, page = tmp_path / "speed", tmp_path / "BENCHMARKS.md"
    command = [*SMALL, "--suites", "headline", "--batch", "1", "2", "--out", str(out), "--report", str(page), "--json"]
    assert main(command) == 0
    payload = json.loads(capsys.readouterr().out)
    record = json.loads((out / "tiny-cpu-float32-l1-v1-headline.json").read_text())
    assert payload["rows"] == record["rows"] and len(record["rows"]) == 2 * 4
    assert {row["batch"] for row in record["rows"]} == {1, 2}
    assert record["shape"]["layers"] == 1 and record["shape"]["full_layers"] == 4 and record["shape"]["is_reduced"]
    assert str(tmp_path) not in json.dumps(record)
    ours = next(row for row in record["rows"] if row["way"] == "compressed, pruned")
    assert f"{ours['ratio']:.3f}" in page.read_text()
    assert "not yet measured" in page.read_text().lower()


def test_text_says_the_ratio(tmp_path, capsys):
    assert main([*SMALL, "--suites", "headline", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "576 -> 288 visual tokens: compressed, pruned" in text and "x native short" in text


def test_stopped_run_goes_on_after_its_last_suite(tmp_path, monkeypatch):
    ran = []

    def failing(bench):
        ran.append("stages")
        raise KeyboardInterrupt

    real = suites.SUITES["headline"]
    counted = {"headline": lambda bench: ran.append("headline") or real(bench), "stages": failing}
    monkeypatch.setattr(suites, "SUITES", {**suites.SUITES, **counted})
    command = [*SMALL, "--suites", "headline", "stages", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-cpu-float32-l1-v1-headline-stages.unfinished.json"]
    monkeypatch.setitem(
        suites.SUITES, "stages", lambda bench: ran.append("stages") or [{"suite": "stages", "way": "x"}]
    )
    assert main(command) == 0
    assert ran == ["headline", "stages", "stages"]
    record = json.loads((tmp_path / "tiny-cpu-float32-l1-v1-headline-stages.json").read_text())
    assert set(record["suites"]) == {"headline", "stages"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "huge"], "shape='huge' is unknown; choose one of tiny"),
        (["--suites", "speed"], "--suites speed is unknown; choose from headline"),
        (["--layers", "40"], "layers=40 must lie within 1..4"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--rounds", "1"], "--rounds 1 must be at least 2"),
        (["--reductions", "58"], "--reductions"),
        (["--detail", "0"], "--detail"),
        (["--decoders", "cubic"], "--decoders cubic is unknown; choose from pruned"),
        (["--dtype", "int3"], "--dtype 'int3' is unknown"),
        (["--device", "cuda:99"], "--device 'cuda:99' cannot be used here"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
        (["--image-size", "big"], "--image-size 'big' must be HEIGHTxWIDTH"),
        (["--image-size", "100x100"], "does not suit a tower of 336x336"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(options, message, tmp_path, capsys):
    assert main([*SMALL, *options, "--out", str(tmp_path / "speed")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "speed").exists()
