"""Records: whole or not at all, refused when they are not what they say, resumed suite by suite."""

import json
import math

import pytest

from dualstream.benchmarks import records
from dualstream.benchmarks.records import RunLog, command_line, load, load_folder, rounded, save


@pytest.fixture(autouse=True)
def fixed_machine(monkeypatch):
    monkeypatch.setattr(records, "describe_machine", lambda: {"cpu": "A"})
    monkeypatch.setattr(records, "describe_versions", lambda: {"torch": "2"})
    monkeypatch.setattr(records, "revision", lambda: "abc")


def start(folder, **options):
    options = {"shape": {"name": "tiny", "image_size": (336, 336)}, "settings": {"rounds": 9}, **options}
    return RunLog(folder, "run", "dualstream bench", **options)


def test_a_record_survives_being_written(tmp_path, make_record, by_hand):
    record = make_record(by_hand.headline({0.49: (1.05, 1.04, 1.06)}))
    save(record, tmp_path / "by-hand.json")
    assert load(tmp_path / "by-hand.json") == record
    assert load(tmp_path / "by-hand.json").of("headline") == record.rows
    assert load(tmp_path / "by-hand.json").of("peers") == []


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, object()])
def test_a_value_that_json_lacks_is_refused_and_leaves_the_old_file(tmp_path, make_record, value):
    path = tmp_path / "by-hand.json"
    save(make_record([]), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="by-hand holds a value that is not plain, finite JSON"):
        save(make_record([{"suite": "peers", "x": value}]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, make_record, by_hand):
    path = tmp_path / "half.json"
    save(make_record(by_hand.stages()), path)
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match=r"half\.json is not complete JSON .*run its command again"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format=99), "has format 99, this version reads format 1"),
        (lambda values: values.pop("rows"), "fields missing or unknown: rows"),
        (lambda values: values.update(color="red"), "fields missing or unknown: color"),
        (lambda values: values["rows"].append({"suite": "other"}), "has 1 rows of no suite it lists"),
    ],
)
def test_another_file_is_refused(tmp_path, make_record, change, message):
    path = tmp_path / "odd.json"
    save(make_record([]), path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_list_is_no_record(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="has format None"):
        load(tmp_path / "list.json")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_folder(tmp_path / "nowhere")


def test_a_stopped_run_goes_on_after_the_suites_it_has(tmp_path):
    first = start(tmp_path)
    first.add("headline", [{"way": "a", "median_ms": 1.0}])
    assert [path.name for path in tmp_path.iterdir()] == ["run.unfinished.json"]
    finished, unfinished = load_folder(tmp_path)
    assert finished == [] and unfinished[0].rows == [{"suite": "headline", "way": "a", "median_ms": 1.0}]

    again = start(tmp_path)
    assert again.done("headline") and not again.done("stages")
    again.add("stages", [{"way": "b"}])
    assert again.finish() == tmp_path / "run.json"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    record = load(tmp_path / "run.json")
    assert [row["way"] for row in record.rows] == ["a", "b"]
    assert set(record.suites) == {"headline", "stages"}
    assert {"date", "seconds", "load_before", "load_after", "revision"} == set(record.suites["stages"])


def test_only_a_finished_run_replaces_an_older_one(tmp_path):
    old = start(tmp_path)
    old.add("headline", [{"way": "old"}])
    old.finish()
    new = start(tmp_path)
    assert not new.done("headline")
    new.add("headline", [{"way": "new"}])
    assert load(tmp_path / "run.json").rows[0]["way"] == "old"
    new.finish()
    assert load(tmp_path / "run.json").rows[0]["way"] == "new"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"rounds": 10}}, "another settings: rounds=9 before, 10 now"),
        ({"shape": None}, "another shape: "),
        ({"shape": {"name": "tiny", "image_size": (336, 672)}}, "another shape: image_size"),
    ],
)
def test_other_settings_do_not_go_on(tmp_path, options, message):
    start(tmp_path).add("headline", [])
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **options)
    assert not start(tmp_path, restart=True, **options).done("headline")


def test_another_machine_does_not_go_on(tmp_path, monkeypatch):
    start(tmp_path).add("headline", [])
    monkeypatch.setattr(records, "describe_machine", lambda: {"cpu": "B"})
    with pytest.raises(ValueError, match="another machine: cpu='A' before, 'B' now"):
        start(tmp_path)


def test_a_suite_is_added_once_and_rows_keep_to_it(tmp_path):
    log = start(tmp_path)
    log.add("headline", [])
    with pytest.raises(ValueError, match="'headline' is already in the record run"):
        log.add("headline", [])
    with pytest.raises(ValueError, match="suite='peers' got rows of 'growth'"):
        log.add("peers", [{"suite": "growth"}])


def test_a_run_without_a_suite_cannot_finish(tmp_path):
    with pytest.raises(ValueError, match="has measured no suite"):
        start(tmp_path).finish()


def test_numbers_are_cut_to_six_digits():
    row = {
        "a": 1.23456789,
        "b": [0.000123456789],
        "c": {"d": (123456789.0, 7)},
        "e": "1.23456789",
        "f": None,
        "g": True,
    }
    assert rounded(row) == {
        "a": 1.23457, "b": [0.000123457], "c": {"d": [123457000.0, 7]}, "e": "1.23456789", "f": None, "g": True
    }  # fmt: skip


def test_the_command_names_no_folder_of_this_machine():
    words = ["/opt/venv/bin/dualstream", "bench", "--out", "/data/secret/speed", "--shape", "tiny", "a b"]
    assert command_line(words) == "dualstream bench --out speed --shape tiny 'a b'"
