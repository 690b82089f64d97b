"""Odd and hostile names in builds, cards and releases; the rest stands in test_release and test_whatsup_boxes."""

import json
import shutil

import pytest
import yaml

from dualstream import cli
from dualstream.modeling import default_model_path


def run(*arguments, capsys, status=0):
    assert cli.main([*map(str, arguments), "--json"]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out)


@pytest.fixture
def decoder(tmp_path):
    folder = tmp_path / "décodeur"
    folder.mkdir()
    for name in ("visual_decoder.json", "visual_decoder.safetensors", "distillation.json"):
        shutil.copy(default_model_path("tiny-llava") / name, folder)
    return folder


def test_names_that_are_not_ascii_come_back_from_the_hub_as_they_were(hub, elsewhere, tmp_path, capsys):
    places = {"left_of": (10, 40), "right_of": (60, 40), "behind": (35, 20), "in-front_of": (35, 60)}
    lines = [
        {"image": f"théière_{relation}_杯子", "bbox": {"théière": [x, y, x + 20, y + 20], "杯子": [38, 42, 58, 62]}}
        for relation, (x, y) in places.items()
    ]
    source = tmp_path / "boîtes.jsonl"
    source.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    run("build", "whatsup-bboxes", "--jsonl", source, "--out", tmp_path / "boîtes", capsys=capsys)
    (tmp_path / "boîtes" / "lisez-moi é.txt").write_text("à part\n", encoding="utf-8")
    run("release", "dataset", tmp_path / "boîtes", "someone/boxes", capsys=capsys)
    assert hub.files("someone/boxes", "dataset")["lisez-moi é.txt"] == "à part\n".encode()
    found = elsewhere(hub, "dataset", "someone/boxes", "v0.1.0", folder=tmp_path)
    assert found["streamed alike"] and found["rows"] == 4
    names = yaml.safe_load(hub.files("someone/boxes", "dataset")["README.md"].decode().split("---")[1])
    subject = next(column for column in names["dataset_info"][0]["features"] if column["name"] == "subject")
    assert set(subject["dtype"]["class_label"]["names"].values()) == {"théière", "杯子"}


@pytest.mark.parametrize("name", ["naïf: a, 'b' \"c\"", "- no list\n---\nlicense: mit", "{{ card_data }}", "a|b`c`"])
def test_a_name_is_text_wherever_it_stands_on_a_card(decoder, capsys, name):
    from huggingface_hub import ModelCard

    run("card", decoder, "--name", name, "--no-picture", capsys=capsys)
    data = ModelCard.load(decoder / "README.md", ignore_metadata_errors=False).data
    assert data.model_name == name and data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("visual_decoder.json", "[]", "no JSON object"),
        ("visual_decoder.json", '{"kind": "linear"', "is damaged"),
        ("visual_decoder.safetensors", "short", "is no safetensors file"),
        ("distillation.json", '{"decoder": 3, "figures": {}, "measured_on": 3}', "is damaged"),
        ("README.md", "---\n- a\n- b\n---\n", "metadata"),
    ],
)
def test_a_damaged_file_is_named_and_no_card_is_written(decoder, capsys, file, content, message):
    (decoder / file).write_text(content)
    before = sorted(path.name for path in decoder.iterdir())
    refused = run("card", decoder, "--no-picture", capsys=capsys, status=2)
    assert message in refused["error"] and sorted(path.name for path in decoder.iterdir()) == before
