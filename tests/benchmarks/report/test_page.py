"""The report: what records say and nothing else, the same bytes every time, gaps named with their commands."""

import argparse
import re
import shlex
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.benchmarks import command
from dualstream.benchmarks.machine import ROOT
from dualstream.benchmarks.records import save
from dualstream.benchmarks.report import goals, missing
from dualstream.benchmarks.report import page as report
from dualstream.benchmarks.suites import OTHER_SUITES, SUITES

RATIOS = {0.16: (1.02, 1.01, 1.03), 0.28: (1.12, 1.05, 1.2), 0.49: (1.3, 1.25, 1.35)}


@given(st.floats(0.1, 3), st.floats(0, 1), st.floats(0.1, 3))
def test_only_an_interval_on_one_side_decides(low, width, limit):
    high = low + width
    word = goals.verdict(low, high, limit)
    assert (word == "met") == (high <= limit)
    assert (word == "missed") == (low > limit)
    assert word in ("met", "missed", "undecided")


def test_an_interval_upside_down_is_refused():
    with pytest.raises(ValueError, match=r"low=2 must not be above high=1"):
        goals.verdict(2, 1, 1.1)


def test_the_summary_follows_the_intervals(make_record, by_hand):
    text = report.render([make_record(by_hand.headline(RATIOS) + by_hand.stages())])
    title = "llava-1.5-7b, 4 of 32 blocks, bfloat16, cpu"
    assert f"- **{title}**, ratio at most 1.10: `pruned` met 1, undecided 1, missed 1 of 3." in text
    assert "| 1.020 [1.010, 1.030] met | 1.120 [1.050, 1.200] undecided | 1.300 [1.250, 1.350] missed |" in text
    assert (
        f"- {title}, batch 1, `pruned`, 49 % fewer: 1.300 [1.250, 1.350], 30.0 ms more than 100 ms; "
        "control 1.010 [0.990, 1.030]; measured by themselves, in ms: reading 1.00, plan 0.500, pool 0.250, "
        "rewrite 0.250."
    ) in text
    assert "misses it in 0 of 3 settings" in text
    assert "natively short, n = 9 rounds, with" in text


def test_the_goal_is_that_of_the_device(make_record, by_hand):
    rows = by_hand.headline({0.49: (1.07, 1.06, 1.08)})
    for device, word in (("cpu", "met 1"), ("cuda", "missed 1")):
        assert f"`pruned` {word} of 1" in report.render([make_record(rows, shape={"device": device})])
    assert "ratio at most" not in report.render([make_record(rows, shape={"device": "mps"})])


def test_the_share_of_reading_is_judged_at_full_depth(make_record, by_hand):
    # Steps of 2 ms together: 0.5 % of 400 ms, and an eighth of that at 32 blocks for 4.
    (share,) = goals.joining_shares(make_record(by_hand.stages(prefill=400.0)))
    assert share["value"] == pytest.approx(0.005) and share["full_value"] == pytest.approx(0.005 / 8)
    assert share["low"] == pytest.approx(0.9 * 2 / 440) and share["high"] == pytest.approx(1.1 * 2 / 360)
    for prefill, word in ((100.0, "met"), (25.0, "undecided"), (10.0, "missed")):
        rows = by_hand.headline({0.49: (1.0, 0.9, 1.1)}) + by_hand.stages(prefill=prefill)
        assert f"of that of all blocks), goal 1 %: {word}." in report.render([make_record(rows)])


def test_a_suite_without_rows_is_said_to_be_missing_with_its_command(make_record, by_hand):
    text = report.render([make_record([by_hand.time("peers", "a peer", 12.0)])])
    for section in report.SECTIONS:
        line = f"- Suite *{section.suite}*: `{missing.suite_command(section.suite)}`"
        assert (line in text) == (section.suite != "peers")
    assert "No time to a first token has been measured yet." in text
    assert text.count("Not yet measured; see [the command](#not-yet-measured).") == len(report.SECTIONS) - 1


def test_full_size_is_missing_until_a_record_has_it(make_record, by_hand):
    full = {"device": "cuda", "layers": 32, "is_reduced": False}
    rows = by_hand.headline({0.16: (1, 1, 1), 0.28: (1, 1, 1)}) + by_hand.headline({0.58: (1, 1, 1)}, batch=8)
    every = [0.16, 0.28, 0.32, 0.49, 0.58]
    assert missing.missing_full_size([make_record(rows, shape=full)]) == [
        ("llava-1.5-7b", 1, [0.32, 0.49, 0.58]),
        ("llava-1.5-7b", 8, [0.16, 0.28, 0.32, 0.49]),
        ("qwen2.5-vl-7b", 1, every),
        ("qwen2.5-vl-7b", 8, every),
    ]
    for lacking in ({"device": "cpu"}, {"dtype": "float32"}, {"is_reduced": True}, {"name": "tiny"}):
        assert len(missing.missing_full_size([make_record(rows, shape={**full, **lacking})])[0][2]) == 5
    done = by_hand.headline(dict.fromkeys(every, (1, 1, 1)))
    done += by_hand.headline(dict.fromkeys(every, (1, 1, 1)), batch=8)
    records = [make_record(done, shape={**full, "name": name}) for name in missing.FULL_SIZE]
    assert missing.missing_full_size(records) == []
    assert missing.missing_section(records, [], ["headline"]).startswith("Nothing: ")


def test_every_command_that_is_named_is_accepted(make_record):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    named = re.findall(r"`dualstream bench ([^`]*)`", report.render([make_record([])]))
    assert len(named) >= len(report.SECTIONS) + 4
    for options in named:
        args = parser.parse_args(shlex.split(options))
        assert args.report is not None or args.suites or args.batch == [1, 8]


def test_numbers_of_any_suite_reach_the_report(make_record, by_hand):
    rows = [by_hand.time("growth", "square", 4.0, image_size=448, kv_bytes=2**20)]
    text = report.render([make_record(rows)])
    assert "| square | 1 | 49 | 576 | 294 | 4.00 [3.60, 4.40] | 9 | 448 | 1.00 MiB |" in text


def test_a_run_without_a_model_is_shown(make_record):
    rows = [{"suite": "startup", "way": "import dualstream", "median_ms": 20.0}]
    text = report.render([make_record(rows, name="startup", shape=None)])
    assert "| import dualstream | 20.0 |" in text and "`dualstream bench --name startup`" not in text
    assert "dualstream bench --name startup    # startup" in text


def test_machines_and_versions_are_said_once(make_record, by_hand):
    first, second = (make_record(by_hand.stages(), name=name) for name in ("a", "b"))
    second.machine["accelerators"] = ["A GPU, 80 GiB"]
    text = report.render([first, second])
    assert "| M1 | Linux x86_64, A processor (2 cores, 2 threads used), 24.0 GiB, avx2, no accelerator |" in text
    assert "| M2 | Linux x86_64, A processor (2 cores, 2 threads used), 24.0 GiB, avx2, A GPU, 80 GiB |" in text
    assert text.count("python 3.11, torch 2 |") == 1
    assert "| `b` | stages | M2 V1 | 2026-01-02 03:04 | 12 | 0.1 → 1.9 | abc |" in text


def test_the_same_records_make_the_same_bytes(tmp_path, make_record, by_hand):
    rows = by_hand.headline(RATIOS) + by_hand.headline(RATIOS, batch=8) + by_hand.stages()
    rows += [
        by_hand.time("peers", way, value) for way, value in (("compressed, pruned", 3.0), ("double prefill", 9.0))
    ]
    curve = {"curve": "batch", "unit": "rows"}
    rows += [by_hand.time("growth", "uncompressed", 5.0 * x, kind="point", x=x, **curve) for x in (1, 2)]
    rows.append(
        {"suite": "growth", "kind": "fit", "way": "uncompressed", **curve, "constant_ms": 0.0, "linear_ms": 5.0}
    )
    save(make_record(rows), tmp_path / "speed" / "by-hand.json")
    stopped = make_record(by_hand.stages(), name="stopped")
    save(stopped, tmp_path / "speed" / "stopped.unfinished.json")
    (tmp_path / "speed" / "peers.md").write_text("A remark about peers.\n")
    target = tmp_path / "BENCHMARKS.md"
    written = report.write_report(tmp_path / "speed", target)
    assert written[0] == target and len(written) == 6
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in report.write_report(tmp_path / "speed", target)} == before
    text = target.read_text()
    assert "A remark about peers." in text
    assert "Run `stopped` was stopped; it has stages" in text and "### stopped" not in text
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert sorted(target.parent / link for link in links) == sorted(written[1:])
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 60_000


def test_nothing_is_rendered_from_nothing(tmp_path):
    with pytest.raises(ValueError, match="has no finished record; measure first"):
        report.write_report(tmp_path, tmp_path / "BENCHMARKS.md")
    assert not (tmp_path / "BENCHMARKS.md").exists()


def test_every_suite_has_a_section():
    assert set(SUITES) <= {section.suite for section in report.SECTIONS}
    assert set(OTHER_SUITES) <= set(missing.WITHOUT_SHAPE)


def test_plans_are_judged_on_an_accelerator_only(make_record, by_hand):
    rows = [by_hand.time("micro", "plan, rle", ms, batch=8, visual_tokens=4608, waits=2) for ms in (0.5, 1.0, 2.0)]
    rows.append(by_hand.time("micro", "plan, rle", 9.0, batch=1, waits=2))
    record = make_record(rows, shape=None, settings={"device": "cuda"})
    text = report.render([record])
    assert "- by-hand: plan, rle, 576 tokens x batch 8: 0.500 [0.450, 0.550] ms, 2 waits; goal 1 ms: met." in text
    assert [row["verdict"] for row in goals.plan_rows(record)] == ["met", "undecided", "missed"]
    assert goals.plan_rows(make_record(rows, shape=None, settings={"device": "cpu"})) == []


def test_peers_stand_side_by_side(make_record, by_hand):
    found = {"ratio": 1.25, "ratio_low": 1.0, "ratio_high": 1.5, "ratio_to": "native short", "waits": 7}
    rows = [by_hand.time("peers", "a", 10.0, **found), by_hand.time("peers", "a", 80.0, batch=8, **found)]
    rows.append(by_hand.time("peers", "b", 20.0, batch=8, **found))
    text = report.render([make_record(rows)])
    assert "| method | keys and values | operations | waits | batch 1, 49 % fewer | batch 8, 49 % fewer |" in text
    assert "| a |  |  | 7 | 10.0, 1.250 [1.000, 1.500] | 80.0, 1.250 [1.000, 1.500] |" in text
    assert "| b |  |  |  |  | 20.0, 1.250 [1.000, 1.500] |" in text


def test_all_blocks_are_said_to_be_calculated(make_record, by_hand):
    row = by_hand.time("stages", "compressed, pruned", 10.0, stage="first token, all blocks")
    row |= {"ratio": 1.2, "ratio_low": 1.15, "ratio_high": 1.25, "ratio_to": "native short"}
    text = report.render([make_record([*by_hand.headline(RATIOS), *by_hand.stages(), row])])
    assert "  - with all blocks, calculated: batch 1, 49 % fewer: `pruned` 1.200 [1.150, 1.250] (missed)." in text


def test_the_report_in_the_repository_is_that_of_its_records(tmp_path):
    committed = ROOT / "BENCHMARKS.md"
    if not committed.exists():
        pytest.skip("nothing has been measured yet")
    shutil.copytree(ROOT / "docs" / "speed", tmp_path / "docs" / "speed")
    written = report.write_report(tmp_path / "docs" / "speed", tmp_path / "BENCHMARKS.md")
    assert written[0].read_text() == committed.read_text(), "run `dualstream bench --report` and commit what it writes"
    for path in written[1:]:
        assert (ROOT / path.relative_to(tmp_path)).is_file(), path.name
