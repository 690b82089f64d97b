"""Rows that survive a kill: atomic units, a claimed folder, the same table whatever the order of the work."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.analysis.resumable_rows import ResumableRows, _stem

SETTINGS = {"model": "tiny", "seed": 0}


def test_units_are_found_again_in_any_order(tmp_path):
    first = ResumableRows(tmp_path / "a", SETTINGS)
    second = ResumableRows(tmp_path / "b", SETTINGS)
    names = ["test/10", "test/9", "a b.png", "x" * 300, "x" * 300 + "y"]
    for name in names:
        first.write(name, [{"unit": name, "value": len(name)}])
    for name in reversed(names):
        second.write(name, pa.table({"unit": [name], "value": [len(name)]}))
    assert first.done == second.done == set(names)
    assert all(name in first for name in names) and "other" not in first
    assert first.table().equals(second.table())
    assert first.table().column("unit").to_pylist() == sorted(names)
    assert first.table(units=["test/9"], columns=["value"]).to_pydict() == {"value": [6]}
    assert first.read("test/9").to_pylist() == [{"unit": "test/9", "value": 6}]


def test_a_unit_without_rows_is_done_and_adds_nothing(tmp_path):
    rows = ResumableRows(tmp_path, SETTINGS)
    assert rows.table().num_rows == 0
    rows.write("empty", [])
    rows.write("one", [{"value": None}])
    rows.write("two", [{"value": 2}])
    assert rows.done == {"empty", "one", "two"}
    assert rows.table().column("value").to_pylist() == [None, 2]


def test_another_run_or_something_else_in_the_folder_is_refused(tmp_path):
    ResumableRows(tmp_path / "run", SETTINGS)
    assert ResumableRows(tmp_path / "run", SETTINGS).done == set()
    with pytest.raises(ValueError, match=r"another configuration \(seed: 0 there, 1 now\)"):
        ResumableRows(tmp_path / "run", {**SETTINGS, "seed": 1})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        ResumableRows(tmp_path / "full", SETTINGS)


@given(st.lists(st.text(max_size=200), min_size=2, max_size=8, unique=True))
def test_different_units_have_different_files(units):
    stems = {_stem(unit) for unit in units}
    assert len(stems) == len(units)
    assert all(len(stem.encode()) < 200 and "/" not in stem and stem not in (".", "..") for stem in stems)


WORKER = """
import sys, time
from dualstream.analysis.resumable_rows import ResumableRows
rows = ResumableRows(sys.argv[1], {"model": "tiny", "seed": 0})
for number in range(400):
    unit = f"unit {number}"
    if unit not in rows:
        rows.write(unit, [{"unit": unit, "value": number * i} for i in range(50)])
        print(unit, flush=True)
        time.sleep(0.002)
"""


def test_killed_and_started_again_gives_the_same_table(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(killed)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = ResumableRows(killed, SETTINGS).done
    assert 20 <= len(done) < 400
    stamps = {path: path.stat().st_mtime_ns for path in (killed / "rows").glob("*.parquet")}
    time.sleep(0.01)
    for folder in (killed, whole):
        subprocess.run([sys.executable, "-c", WORKER, str(folder)], check=True, env=environment, capture_output=True)
    assert ResumableRows(killed, SETTINGS).table().equals(ResumableRows(whole, SETTINGS).table())
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())  # nothing was done twice
    assert not list((killed / "rows").glob(".*.partial"))
