"""Corpora as a user builds them: killed and taken up, in several processes, compared, described, timed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dualstream.cli import main
from dualstream.data_builders.scenes import build_scenes
from dualstream.data_builders.token_maps import (
    BuildOptions,
    MapReader,
    compare_corpora,
    measure_throughput,
    open_source,
)
from dualstream.data_builders.token_maps.compare import main as compare_command
from dualstream.data_builders.token_maps.shards import file_sha256
from dualstream.data_builders.token_maps.survey import Mean
from dualstream.data_builders.token_maps.throughput import describe_throughput
from dualstream.modeling import load_model

IMAGES, ROWS = 160, 4
PROGRAM = [sys.executable, "-m", "dualstream.cli", "build", "token-maps"]
OPTIONS = ["--images", f"scenes:test:{IMAGES}", "--rows-per-shard", str(ROWS), "--batch-size", "3", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "maps"
    subprocess.run([*PROGRAM, *OPTIONS, "--out", str(out), "--json"], check=True, env=ENVIRONMENT, capture_output=True)
    return out


def finished_shards(out: Path) -> int:
    return len(list(out.glob(".build/shard-*.json")))


def run_until(out: Path, shards: int) -> None:
    """Start the build and kill it with SIGKILL as soon as so many shards are finished."""
    process = subprocess.Popen([*PROGRAM, *OPTIONS, "--out", str(out)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while finished_shards(out) < shards and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the build ended before it could be killed"


@pytest.mark.slow
def test_killed_twice_and_taken_up_equals_uninterrupted(uninterrupted, tmp_path, capsys):
    out = tmp_path / "maps"
    run_until(out, 2)
    after_first = finished_shards(out)
    run_until(out, after_first + 3)
    after_second = finished_shards(out)
    total = IMAGES // ROWS
    assert 2 <= after_first < after_second < total
    (out / "data" / "connector" / ".test-00099.parquet.0badcafe.partial").write_bytes(b"left by a killed process")
    run = subprocess.run([*PROGRAM, *OPTIONS, "--out", str(out), "--json"], env=ENVIRONMENT, capture_output=True)
    report = json.loads(run.stdout)
    assert report["complete"] and report["skipped"] >= after_second
    assert report["shards"] + report["skipped"] == total and report["orphans_removed"] >= 1
    result = compare_corpora(uninterrupted, out)
    assert result.equal, result.examples
    assert result.rows == {"connector": IMAGES, "llm-5": IMAGES}
    assert result.identical_files == result.files == 2 * total
    assert not list(out.rglob("*.partial"))
    assert (out / "README.md").read_bytes() == (uninterrupted / "README.md").read_bytes()
    assert compare_command([str(uninterrupted), str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


@pytest.mark.slow
def test_two_processes_of_torchrun_make_one_corpus(uninterrupted, tmp_path):
    out = tmp_path / "maps"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--log-dir",
        str(tmp_path / "log"),
    ]
    module = ["--tee", "3", "-m", *PROGRAM[2:]]
    run = subprocess.run(
        [*launcher, *module, *OPTIONS, "--out", str(out), "--json"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = [json.loads(line[line.index("{") :]) for line in run.stdout.splitlines() if '"workers"' in line]
    assert sorted(report["worker"] for report in reports) == [0, 1]
    assert [report["workers"] for report in reports] == [2, 2]
    assert [report["shards"] for report in reports] == [IMAGES // ROWS // 2] * 2
    assert any(report["complete"] for report in reports)
    assert compare_corpora(uninterrupted, out).equal
    assert (out / "README.md").read_bytes() == (uninterrupted / "README.md").read_bytes()


def changed(corpus: Path, out: Path, change) -> Path:
    """Copy a corpus and rewrite the second file of one part by `change`, a function of its table."""
    shutil.copytree(corpus, out)
    file = sorted((out / "data" / "llm-5").glob("*.parquet"))[1]
    pq.write_table(change(pq.read_table(file)), file)
    return out


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def shifted(table: pa.Table, by: float) -> pa.Table:
    values = [[[number + by for number in row] for row in rows] for rows in table["log_probs"].to_pylist()]
    return with_column(table, "log_probs", values)


CHANGES = {
    "a lost row": (lambda t: pa.concat_tables([t[:1], t[2:]]), "llm-5: only the first corpus has row 5"),
    "a doubled row": (lambda t: pa.concat_tables([t[:2], t[1:]]), "llm-5: row 5 comes twice or out of order"),
    "rows out of order": (lambda t: pa.concat_tables([t[2:], t[:2]]), "llm-5: row 4 comes twice or out of order"),
    "another word": (
        lambda t: with_column(t, "text", [["x"] * len(row) for row in t["text"].to_pylist()]),
        "llm-5: row 6 differs in text",
    ),
    "another probability": (lambda t: shifted(t, -0.01), "llm-5: row 7 differs in log_probs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_comparison_sees(name, uninterrupted, tmp_path, capsys):
    change, difference = CHANGES[name]
    other = changed(uninterrupted, tmp_path / "maps", change)
    result = compare_corpora(uninterrupted, other)
    assert not result.equal and difference in result.examples
    assert result.identical_files == result.files - 1
    if name == "another probability":
        assert compare_corpora(uninterrupted, other, atol=0.02).equal
        assert not compare_corpora(uninterrupted, other, atol=0.001).equal
    assert compare_command([str(uninterrupted), str(other)]) == 1
    assert difference in json.loads(capsys.readouterr().out)["examples"]


def test_comparison_looks_past_the_cut_into_shards(uninterrupted, tmp_path):
    out = tmp_path / "maps"
    for part in ("connector", "llm-5"):
        files = sorted((uninterrupted / "data" / part).glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(file) for file in files])
        (out / "data" / part).mkdir(parents=True)
        pq.write_table(table, out / "data" / part / "test-00000.parquet", row_group_size=7)
    shutil.copy(uninterrupted / "rejects.jsonl", out)
    result = compare_corpora(uninterrupted, out)
    assert result.equal and result.rows == {"connector": IMAGES, "llm-5": IMAGES}
    shutil.rmtree(out / "data" / "llm-5")
    assert compare_corpora(uninterrupted, out).examples == ["only one corpus has llm-5"]
    with pytest.raises(ValueError, match="holds no corpus"):
        compare_corpora(uninterrupted, tmp_path)


def test_card_and_manifest_are_of_the_data(uninterrupted):
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    text = (uninterrupted / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert manifest["images"] == IMAGES and manifest["rows"] == 2 * IMAGES and manifest["rejected"] == 0
    assert len(manifest["shards"]) == IMAGES // ROWS
    for shard in manifest["shards"]:
        for name, facts in shard["files"].items():
            assert file_sha256(uninterrupted / name) == facts["sha256"]
            assert pq.read_metadata(uninterrupted / name).num_rows == facts["rows"] == ROWS
    assert [config["config_name"] for config in header["configs"]] == ["all", "connector", "llm-5"]
    assert [config.get("default", False) for config in header["configs"]] == [True, False, False]
    for config in header["configs"]:
        (entry,) = config["data_files"]
        rows = sum(pq.read_metadata(file).num_rows for file in uninterrupted.glob(entry["path"]))
        assert entry["split"] == "test" and rows == (2 if config["config_name"] == "all" else 1) * IMAGES
    assert header["license"] == "apache-2.0" and "&id" not in text
    for picture in ("figures/connector.png", "figures/llm-5.png"):
        assert f"]({picture})" in text and (uninterrupted / picture).stat().st_size > 1000
    assert "synthetic" in text and "$" not in text.split("---", 2)[2]
    assert str(uninterrupted.parent) not in text + json.dumps(manifest)

    rows = [row for file in sorted(uninterrupted.glob("data/connector/*")) for row in pq.read_table(file).to_pylist()]
    deepest = [row for file in sorted(uninterrupted.glob("data/llm-5/*")) for row in pq.read_table(file).to_pylist()]
    figures = manifest["figures"]["connector"]
    kept = sum(len(row["runs"]) / len(row["token_ids"]) for row in rows) / IMAGES
    agreement = sum(
        sum(a[0] == b[0] for a, b in zip(row["token_ids"], deep["token_ids"], strict=True)) / len(row["token_ids"])
        for row, deep in zip(rows, deepest, strict=True)
    )
    assert figures["runs"]["mean"] == pytest.approx(kept, abs=1e-3)
    assert figures["agreement"]["mean"] == pytest.approx(agreement / IMAGES, abs=1e-3)
    words = [word.strip() for row in rows for word in row["text"]]
    assert figures["words"]["."] == pytest.approx(words.count(".") / len(words), abs=1e-3)


def test_mean_and_interval_are_those_of_the_values():
    import numpy as np

    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    figure = Mean()
    for part in np.split(values, 10):
        figure.add(part)
    half = 1.96 * values.std() / np.sqrt(500)
    expected = [values.mean(), values.mean() - half, values.mean() + half]
    assert [figure.to_dict()["mean"], *figure.to_dict()["interval"]] == pytest.approx(expected, abs=1e-3)
    assert figure.to_dict()["n"] == 500


def test_throughput_is_measured_over_the_same_pictures(tmp_path):
    build_scenes("test", 9).to_parquet(tmp_path / "scenes.parquet")
    reader = MapReader(*load_model("tiny-llava", device="cpu"), "tiny-llava", "connector,1")
    passes = []
    forward = reader.forward
    reader.forward = lambda inputs, visit: (passes.append(len(inputs["input_ids"])), forward(inputs, visit))[1]
    source = open_source(str(tmp_path / "scenes.parquet"), split="test")
    figures = measure_throughput(source, reader, BuildOptions(4, 6), images=7, rounds=2)
    assert sum(passes) == 7 * 3 * 3  # three ways, one warm-up and two rounds
    assert figures["images"] == 7 and set(figures["images_per_second"]) == {"forward", "bare", "build"}
    for other in ("bare", "forward"):
        for clock in ("wall", "processor", "model_thread"):
            share = figures["build_speed_as_share_of"][other][clock]
            assert 0 < share["min"] <= share["interval"][0] <= share["median"] <= share["interval"][1] <= share["max"]
    for wall, processor, model_thread in figures["seconds"]["build"]:
        assert 0 < model_thread <= processor + 0.01 and wall > 0
    assert "build / bare, model thread time" in describe_throughput(figures)
    assert reader.final_norm


def test_command_measures_throughput(capsys, monkeypatch):
    monkeypatch.setattr("dualstream.data_builders.token_maps.command.MEASURED_IMAGES", 4)
    arguments = ["build", "token-maps", "--images", "scenes:test:6", "--depths", "connector", "--json"]
    assert main([*arguments, "--measure-throughput", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    assert main([*arguments, "--measure-throughput", "0"]) == 2
