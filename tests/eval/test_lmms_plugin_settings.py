"""Arguments, generation settings and records of the plugin: what is accepted, what is refused, and in which words."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.eval.lmms_model.arguments import ModelArguments
from dualstream.eval.lmms_model.generation import DEFAULT_MAX_NEW_TOKENS, read_generation_settings
from dualstream.eval.lmms_model.records import SampleRecords, cost_fields, folder_beside_results
from dualstream.eval.lmms_model.runner import Cost
from dualstream.eval.prompt_costs import PromptTokens


def test_arguments_are_read_as_the_harness_hands_them_over():
    found = ModelArguments.read(
        {"pretrained": "tiny-qwen2-vl", "compression": "random@0.4", "rope_scaling": "poly:99:8", "batch_size": "8",
         "trust_remote_code": True, "device_map": "cpu", "revision": 3, "dtype": "float32", "device": None}
    )  # fmt: skip
    assert (str(found.compression), found.batch_size, found.revision) == ("random@0.4", 8, "3")
    assert found.rope_scaling.type == "poly" and found.one_device == "cpu" and not found.is_spread
    spread = ModelArguments.read({"device_map": "auto"})
    assert spread.is_spread and spread.one_device is None and spread.compression is None
    assert ModelArguments.read({}) == ModelArguments()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compresion": "rle"}, r"compresion='rle' is unknown; accepted are pretrained, .*Did you mean compression\?"),
        ({"max_pixels": 5}, "max_pixels=5 is unknown"),
        ({"compression": "squeeze"}, "squeeze"),
        ({"rope_scaling": "wave:3"}, "wave"),
        ({"batch_size": "auto"}, r"batch_size='auto' is not accepted; give a number .*'auto' is not supported"),
        ({"batch_size": 0}, "batch_size=0 is not accepted"),
        ({"trust_remote_code": "yes"}, "trust_remote_code='yes' is not accepted; give true or false"),
        ({"pretrained": True}, "pretrained=True is not accepted; give a name"),
        ({"device": "cpu", "device_map": "auto"}, "device_map='auto' is not accepted; give left out when device"),
    ],
)
def test_what_is_not_accepted_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments.read(given)


def settings_of(**given):
    found = read_generation_settings(given)
    return dict(found.options), found.stops


def test_decoding_is_greedy_where_the_task_says_so():
    greedy = {"do_sample": False, "max_new_tokens": 10, "num_beams": 1}
    task = {"max_new_tokens": 10, "do_sample": False, "temperature": 0, "num_beams": 1, "until": []}
    assert settings_of(**task) == (greedy, ())
    assert settings_of(max_gen_toks=10, num_beams=1, temperature=0.0, top_p=None, until="\n\n") == (greedy, ("\n\n",))
    assert settings_of(max_new_tokens=10, num_beams=1, do_sample=True, temperature=0, top_p=0.9)[0] == greedy
    assert settings_of(max_new_tokens=10, num_beams=1, do_sample=False, temperature=0.7)[0] == greedy
    assert settings_of() == ({"do_sample": False, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS}, ())


def test_decoding_samples_where_the_task_says_so():
    assert settings_of(temperature=0.7, top_p=0.9)[0] == {
        "do_sample": True, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "temperature": 0.7, "top_p": 0.9
    }  # fmt: skip
    assert settings_of(do_sample=True)[0]["do_sample"] is True


def test_settings_of_other_backends_are_left_out_and_unknown_ones_refused():
    given = {"image_aspect_ratio": "pad", "seed": 1, "stop_sequences": ["a", ""]}
    assert settings_of(**given)[1] == ("a",) and given["stop_sequences"] == ["a", ""]
    with pytest.raises(ValueError, match="max_tokens is no setting of generate"):
        settings_of(max_tokens=3)
    with pytest.raises(ValueError, match="until=3 is not accepted"):
        settings_of(until=3)


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_an_answer_is_cut_before_the_first_stop(text, stops):
    kept = read_generation_settings({"until": stops}).cut(text)
    assert text.startswith(kept) and not any(stop in kept for stop in stops)
    assert kept == text or any(text[len(kept) :].startswith(stop) for stop in stops)


def test_records_are_written_at_once_and_repeats_are_counted(tmp_path):
    records = SampleRecords(tmp_path / "new" / "folder", rank=1)
    records.start()
    assert [records.repeat("task", 3, 0), records.repeat("task", 3, 0), records.repeat("task", 3, 1)] == [0, 1, 0]
    records.start()
    assert records.repeat("task", 3, 0) == 0
    cost = Cost(PromptTokens(64, 20, 41), 4, 230400, 0.25, 8)
    rows = [{"task": "task", "doc_id": 3, **cost_fields(cost)}]
    records.add(rows)
    records.add(rows)
    assert records.path.name.endswith("_rank1.jsonl")
    assert [json.loads(line) for line in records.path.read_text().splitlines()] == rows * 2 == records.rows
    values = {**dataclasses.asdict(cost)["prompt"], "new": 4, "kv": 230400, "seconds": 0.25, "batch": 8}
    assert sorted(map(float, cost_fields(cost).values())) == sorted(map(float, values.values()))
    records.clear()
    assert records.rows == [] and len(records.path.read_text().splitlines()) == 2


def test_records_lie_beside_the_results():
    assert str(folder_beside_results(["--model", "x", "--output_path", "out", "--log_samples"])) == "out/records"
    assert str(folder_beside_results(["--output_path=out/a"])) == "out/a/records"
    assert folder_beside_results(["--output", "out"]) is None
