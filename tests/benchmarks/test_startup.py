"""Starts are timed in fresh processes, and what they import is told by name."""

import json

import pytest

from dualstream.benchmarks import startup
from dualstream.cli import COMMANDS


def test_every_command_and_the_imports_are_measured():
    programs = startup.programs()
    assert programs[startup.BARE] == "pass"
    assert all(f"dualstream {name} --help" in programs for name in COMMANDS)
    assert "import dualstream" in programs and "import torch" in programs


def test_rows_tell_time_and_what_was_imported():
    chosen = {"import dualstream": "import dualstream", "csv": "import csv", "waits": "import time; time.sleep(0.4)"}
    calls = []
    rows = startup.run(2, lambda: calls.append(1), chosen)
    assert {row["way"] for row in rows} == {startup.BARE, *chosen} and len(calls) == (2 + 1) * len(rows)
    found = {row["way"]: row for row in rows}
    assert rows[0]["way"] == "waits" and 300 < found["waits"]["added_ms"] < 1500
    assert found["csv"]["modules"] > 0 == found[startup.BARE]["modules"] and found["csv"]["heavy"] == []
    for row in rows:
        assert row["suite"] == "startup" and row["rounds"] == 2 and row["ratio_to"] == startup.BARE
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert found[startup.BARE]["ratio"] == 1
    assert json.loads(json.dumps(rows)) == rows


def test_libraries_run_in_fewer_rounds(monkeypatch):
    monkeypatch.setattr(startup, "LIBRARIES", ("csv",))
    monkeypatch.setattr(startup, "LIBRARY_ROUNDS", 2)
    rows = startup.run(3, chosen={"csv": "import csv", "import dualstream": "import dualstream"})
    assert {row["way"]: row["rounds"] for row in rows} == {startup.BARE: 3, "import dualstream": 3, "csv": 2}


def test_modules_are_those_of_a_fresh_process():
    assert "numpy" not in startup.modules_after("pass")
    found = startup.modules_after("from dualstream.cli import main; main(['--help'])")
    assert "dualstream.cli" in found and not found & {*startup.HEAVY, "numpy"}
    assert "numpy" in startup.modules_after("import numpy")


def test_a_program_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match=r"(?s)status 1: .*ModuleNotFoundError"):
        startup.run(2, chosen={"broken": "import no_such_module_at_all"})
