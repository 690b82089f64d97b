"""Releases against a Hub over HTTP: round trips, cut and repeated uploads, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualstream import cli
from dualstream.data_builders.scenes import make_scene, render
from dualstream.modeling import LlavaWithVisualDecoder, default_model_path
from dualstream.processing import LlavaWithVisualDecoderProcessor

CARD = """---
license: apache-2.0
library_name: transformers
tags: [dualstream]
---
# A model

```python
model = AutoModelForImageTextToText.from_pretrained("REPO_OR_FOLDER", trust_remote_code=True)
```
"""


def release(*arguments, capsys, status=0):
    assert cli.main(["release", *map(str, arguments), "--json"]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out) if captured.out else captured.err


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The embedded LLaVA as a folder that compresses by itself."""
    folder = tmp_path_factory.mktemp("release") / "model"
    source = default_model_path("tiny-llava")
    LlavaWithVisualDecoder.from_pretrained(source).save_pretrained(folder)
    LlavaWithVisualDecoderProcessor.from_pretrained(source, compression="rle").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def model_folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "model"))


def test_a_model_is_used_from_its_repository_alone(hub, model_folder, elsewhere, tmp_path, capsys):
    payload = release("model", model_folder, "someone/reads", "--tag", "v9", capsys=capsys)
    assert payload["new_commit"] and payload["loaded"]["model"] == "LlavaWithVisualDecoder"
    stored = hub.files("someone/reads", revision="v9")
    for path in model_folder.rglob("*"):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            assert stored[path.relative_to(model_folder).as_posix()] == path.read_bytes()
    assert b'from_pretrained("someone/reads", revision="v9", trust_remote_code=True)' in stored["README.md"]
    assert (model_folder / "README.md").read_text() == CARD, "the folder itself is left alone"

    render(make_scene(1_100_000_000), 96).save(tmp_path / "scene.png")
    found = elsewhere(hub, "model", "someone/reads", "v9", tmp_path / "scene.png", folder=tmp_path)
    here = LlavaWithVisualDecoder.from_pretrained(model_folder)
    processor = LlavaWithVisualDecoderProcessor.from_pretrained(model_folder)
    content = [{"type": "image", "image": render(make_scene(1_100_000_000), 96)}]
    content.append({"type": "text", "text": "How many objects are there?"})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        ids = here.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found["class"] == "LlavaWithVisualDecoder"
    assert found["ids"] == ids[0].tolist() and found["piped"] == found["said"]
    assert found["kept"] == here.last_compression.kept_tokens


def test_a_second_identical_release_makes_no_commit_and_a_changed_one_needs_a_new_tag(hub, model_folder, capsys):
    first = release("model", model_folder, "someone/again", "--no-load", capsys=capsys)
    assert hub.repo("someone/again").messages == ["initial commit", "Release v0.1.0"]
    second = release("model", model_folder, "someone/again", "--no-load", capsys=capsys)
    assert not second["new_commit"] and second["commit"] == first["commit"]
    assert {row["state"] for row in second["files"]} == {"same"}
    assert len(hub.repo("someone/again").messages) == 2

    (model_folder / "extra.txt").write_text("more\n")
    (model_folder / "chat_template.jinja").unlink()
    refused = release("model", model_folder, "someone/again", "--no-load", capsys=capsys, status=2)
    assert "stands for another content" in json.dumps(refused)
    assert len(hub.repo("someone/again").messages) == 2
    third = release("model", model_folder, "someone/again", "--no-load", "--tag", "v2", capsys=capsys)
    assert third["deleted"] == ["chat_template.jinja"]
    assert [row["file"] for row in third["files"] if row["state"] != "same"] == ["README.md", "extra.txt"]
    assert "chat_template.jinja" not in hub.files("someone/again") and "extra.txt" in hub.files("someone/again")
    assert "chat_template.jinja" in hub.files("someone/again", revision="v0.1.0")


def test_a_dry_run_shows_what_a_release_sends_and_sends_nothing(hub, model_folder, capsys):
    shown = release("model", model_folder, "someone/dry", "--no-load", "--dry-run", capsys=capsys)
    assert hub.repos == {} and not [path for method, path in hub.requests if method in ("POST", "PUT")]
    done = release("model", model_folder, "someone/dry", "--no-load", capsys=capsys)
    assert shown["files"] == done["files"]
    sent = hub.files("someone/dry")
    assert {row["file"]: row["bytes"] for row in shown["files"]} == {
        name: len(content) for name, content in sent.items() if name != ".gitattributes"
    }


def test_an_upload_that_was_cut_goes_on_and_ends_the_same(hub, model_folder, capsys, monkeypatch):
    split_weights(model_folder)
    shards = {path.name: path.read_bytes() for path in model_folder.glob("*.safetensors")}
    last = hashlib.sha256(shards["model-00002-of-00002.safetensors"]).hexdigest()
    first = hashlib.sha256(shards["model-00001-of-00002.safetensors"]).hexdigest()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.broken = {last}
    message = json.dumps(release("model", model_folder, "someone/cut", "--no-load", capsys=capsys, status=2))
    assert "model-00002-of-00002.safetensors" in message and "the same command goes on" in message
    assert hub.repo("someone/cut").messages == ["initial commit"] and set(hub.large) == {first}
    hub.broken = set()
    hub.requests.clear()
    release("model", model_folder, "someone/cut", "--no-load", capsys=capsys)
    sent = [path.rsplit("/", 1)[1] for method, path in hub.requests if method == "PUT"]
    assert sent == [last], "what had arrived is not sent again"
    stored = hub.files("someone/cut")
    assert {name: stored[name] for name in shards} == shards
    assert hub.repo("someone/cut").messages == ["initial commit", "Release v0.1.0"]


def split_weights(folder):
    """One weights file becomes two and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_a_dataset_is_loaded_and_streamed_from_its_repository(hub, elsewhere, tmp_path, capsys):
    places = {"left_of": (10, 40), "right_of": (60, 40), "behind": (35, 20), "in-front_of": (35, 60)}
    lines = [
        {"image": f"cup_{relation}_tape", "bbox": {"cup": [x, y, x + 20, y + 20], "tape": [38, 42, 58, 62]}}
        for relation, (x, y) in places.items()
    ]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build = ["build", "whatsup-bboxes", "--jsonl", str(tmp_path / "boxes.jsonl"), "--out", str(tmp_path / "boxes")]
    assert cli.main(build) == 0
    capsys.readouterr()
    payload = release("dataset", tmp_path / "boxes", "someone/boxes", capsys=capsys)
    assert payload["loaded"] == {"rows": {"default": {"test": 4}}}
    found = elsewhere(hub, "dataset", "someone/boxes", "v0.1.0", folder=tmp_path)
    assert found["rows"] == 4 and found["streamed alike"]
    assert found["first"]["subject_box"] == [35, 20, 55, 40]
    assert b'load_dataset("someone/boxes", revision="v0.1.0"' in hub.files("someone/boxes", "dataset")["README.md"]


def test_a_decoder_is_a_repository_of_its_own(hub, tmp_path, capsys):
    folder, source = tmp_path / "decoder", Path(default_model_path("tiny-llava"))
    folder.mkdir()
    for name in ("visual_decoder.json", "visual_decoder.safetensors"):
        shutil.copy(source / name, folder)
    (folder / "README.md").write_text(CARD)
    release("model", folder, "someone/decoder", capsys=capsys)
    assert set(hub.files("someone/decoder")) == {
        "README.md", ".gitattributes", "visual_decoder.json", "visual_decoder.safetensors",
    }  # fmt: skip
    (folder / "visual_decoder.json").write_text("{}")
    refused = release("model", folder, "someone/decoder", capsys=capsys, status=1)
    assert any(problem["file"] == "visual_decoder.json" for problem in refused["problems"])


def damage(folder, how):
    if how == "pickle by name":
        torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    elif how == "pickle in disguise":
        torch.save({"a": torch.zeros(1)}, folder / "notes.dat")
    elif how == "cut weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "no safetensors":
        (folder / "model.safetensors").write_bytes(b"\x01" * 100)
    elif how == "huge":
        with (folder / "video.mp4").open("wb") as file:
            file.truncate(50_000_000_001)
    elif how == "unfinished":
        (folder / "model.safetensors.partial").write_bytes(b"a")
    elif how == "absolute path in config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "/nfs/run7/model"}))
    elif how == "path in card":
        (folder / "README.md").write_text(CARD + "\nTrained in /home/someone/run.\n")
    elif how == "secret":
        (folder / "notes.txt").write_text("token = 'hf_" + "a" * 34 + "'\n")
    elif how == "no card":
        (folder / "README.md").unlink()
    elif how == "unfinished card":
        (folder / "README.md").write_text(CARD + "\nTODO: results\n")
    elif how == "no licence":
        (folder / "README.md").write_text(CARD.replace("license: apache-2.0\n", ""))
    elif how == "picture missing":
        (folder / "README.md").write_text(CARD + "\n![map](map.png)\n")
    elif how == "code missing":
        (folder / "visual_compression.py").unlink()
    elif how == "code needs the package":
        path = folder / "visual_compression.py"
        path.write_text("from dualstream.modeling import families\n" + path.read_text())
    elif how == "damaged json":
        (folder / "config.json").write_text('{"model_type": ')
    elif how == "local base model":
        (folder / "README.md").write_text(CARD.replace("tags:", "base_model: ./llava\ntags:"))


REFUSALS = {
    "pickle by name": "may run code", "pickle in disguise": "holds a pickle", "cut weights": "cut short or damaged",
    "no safetensors": "no safetensors file", "huge": "Hub takes", "unfinished": "left over",
    "absolute path in config": "place on one machine", "path in card": "place on one machine",
    "secret": "Hugging Face token", "no card": "is missing", "unfinished card": "still says 'TODO'",
    "no licence": "lacks license", "picture missing": "points at map.png", "code missing": "visual_compression",
    "code needs the package": "imports dualstream", "damaged json": "is no JSON", "local base model": "no repository",
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSALS)
def test_what_strangers_could_not_use_or_should_not_see_is_refused(hub, model_folder, capsys, how):
    damage(model_folder, how)
    payload = release("model", model_folder, "someone/bad", "--no-load", capsys=capsys, status=1)
    assert any(problem["refused"] and REFUSALS[how] in problem["message"] for problem in payload["problems"])
    assert hub.repos == {} and "hf_aaa" not in json.dumps(payload)


def test_weights_that_do_not_fit_the_model_are_refused(hub, model_folder, capsys):
    tensors = load_file(model_folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.0" in name and "language" in name))
    save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt"})
    payload = release("model", model_folder, "someone/bad", capsys=capsys, status=1)
    assert any("missing_keys" in problem["message"] for problem in payload["problems"]) and hub.repos == {}


def test_a_folder_or_a_name_that_is_none_is_an_error(hub, tmp_path, capsys):
    assert "is no folder" in json.dumps(release("model", tmp_path / "no", "a/b", capsys=capsys, status=2))
    (tmp_path / "empty").mkdir()
    assert "no file" in json.dumps(release("model", tmp_path / "empty", "a/b", capsys=capsys, status=2))
    for name in ("model", "a/b/c", "a/..b"):
        assert "REPO_ID" in json.dumps(release("model", tmp_path / "empty", name, capsys=capsys, status=2))
