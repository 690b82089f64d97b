"""Small repositories over the loopback Hub: a folder without weights, and a LoRA, on top of a stock checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dualstream import cli
from dualstream.data_builders.scenes import make_scene, render
from dualstream.modeling import LlavaWithVisualDecoder, Qwen2VLWithVisualDecoder, default_model_path, load_model
from dualstream.processing import LlavaWithVisualDecoderProcessor

SCENE = 1_100_000_000
QUESTION = "How many objects are there?"


def dualstream(*arguments, capsys, status=0):
    assert cli.main([*map(str, arguments), "--json"]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out) if captured.out else captured.err


def chat_inputs(processor):
    content = [{"type": "image", "image": render(make_scene(SCENE), 96)}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


@pytest.fixture
def decoder(tmp_path):
    folder = tmp_path / "decoder"
    folder.mkdir()
    for name in ("visual_decoder.json", "visual_decoder.safetensors", "distillation.json"):
        shutil.copy(Path(default_model_path("tiny-llava")) / name, folder)
    return folder


@pytest.fixture
def base(hub, stock_files, tmp_path, monkeypatch, capsys):
    """The embedded LLaVA as a stock checkpoint of somebody else, with a later commit that is not ours."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = stock_files(default_model_path("tiny-llava"), tmp_path / "base")
    dualstream("release", "model", folder, "maker/base", "--no-load", "--tag", "first", capsys=capsys)
    pinned = hub.repo("maker/base").head
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "vision_feature_layer": -1}
    api = HfApi(endpoint=hub.url)
    api.upload_file(
        path_or_fileobj=json.dumps(changed).encode(),
        path_in_repo="config.json",
        repo_id="maker/base",
        token="hf_local",
    )
    return pinned


def test_a_folder_without_weights_is_used_from_its_repository_as_a_whole_one(
    hub, base, decoder, elsewhere, tmp_path, capsys
):
    out = tmp_path / "small"
    facts = dualstream(
        "export", out, "--base", "maker/base", "--base-revision", "first", "--decoder", decoder,
        "--compression", "rle",
        capsys=capsys,
    )  # fmt: skip
    assert facts["weights_from"] == {"repo_id": "maker/base", "revision": base} and facts["bytes"] < 1_500_000
    assert {path.name for path in out.glob("*.safetensors")} == {"visual_decoder.safetensors"}
    dualstream("card", out, "--no-picture", capsys=capsys)
    payload = dualstream("release", "model", out, "someone/small", capsys=capsys)
    assert payload["loaded"]["weights_from"]["repo_id"] == "maker/base"
    assert payload["loaded"]["model"] == "LlavaWithVisualDecoder"

    render(make_scene(SCENE), 96).save(tmp_path / "scene.png")
    found = elsewhere(hub, "model", "someone/small", "v0.1.0", tmp_path / "scene.png", folder=tmp_path)
    whole = LlavaWithVisualDecoder.from_pretrained(default_model_path("tiny-llava"))
    processor = LlavaWithVisualDecoderProcessor.from_pretrained(default_model_path("tiny-llava"), compression="rle")
    inputs = chat_inputs(processor)
    with torch.no_grad():
        ids = whole.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found["class"] == "LlavaWithVisualDecoder" and found["ids"] == ids[0].tolist()
    assert found["piped"] == found["said"] and found["kept"] == whole.last_compression.kept_tokens

    here = LlavaWithVisualDecoder.from_pretrained("someone/small", revision="v0.1.0")
    assert {k: v.tolist() for k, v in here.state_dict().items()} == {
        k: v.tolist() for k, v in whole.state_dict().items()
    }
    assert here.config.weights_from is None and here.config.vision_feature_layer == -2
    here.save_pretrained(tmp_path / "whole")
    again = LlavaWithVisualDecoder.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.visual_decoder.weight, here.visual_decoder.weight)
    loaded, _ = load_model("someone/small", device="cpu")
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=6, do_sample=False), ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "tiny-llava"), "must be OWNER/NAME"),
        (("--base", "maker/none"), "is not to be had"),
        (("--base", "maker/base", "--base-revision", "gone"), "is not to be had"),
        (("--base", "maker/base", "--rope-scaling", "poly:99:8"), "has no RoPE"),
        (("--base", "maker/base", "--compression", "zip"), "zip"),
        (("--base", "maker/base", "--decoder", "OTHER"), "another model"),
        (("--base", "maker/base", "--decoder", "EMPTY"), "holds no visual decoder"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(base, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"OTHER": str(default_model_path("tiny-qwen2-vl")), "EMPTY": str(tmp_path / "empty")}
    before = {path.name for path in tmp_path.iterdir()}
    arguments = [places.get(word, word) for word in arguments]
    refused = dualstream("export", tmp_path / "out", *arguments, capsys=capsys, status=2)
    assert message in json.dumps(refused)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}


def test_a_scaled_rope_and_its_weights_may_come_from_two_places(hub, stock_files, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = stock_files(default_model_path("tiny-qwen2-vl"), tmp_path / "base")
    dualstream("release", "model", source, "maker/qwen", "--no-load", capsys=capsys)
    common = ("--rope-scaling", "poly:99:8", "--decoder", default_model_path("tiny-qwen2-vl"))
    dualstream("export", tmp_path / "small", "--base", "maker/qwen", *common, capsys=capsys)
    dualstream("export", tmp_path / "whole", "--base", source, "--whole", *common, capsys=capsys)
    small, whole = (Qwen2VLWithVisualDecoder.from_pretrained(tmp_path / name) for name in ("small", "whole"))
    assert small.config.vision_rope_scaling == whole.config.vision_rope_scaling is not None
    stock, processor = load_model(source, device="cpu")
    inputs = chat_inputs(processor)
    logits = [model(**inputs).logits for model in (small, whole, stock)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=1e-3)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "weights_from": {"revision": "main"}}))
    with pytest.raises(ValueError, match="must be an object with repo_id"):
        Qwen2VLWithVisualDecoder.from_pretrained(tmp_path / "small")


def test_an_export_replaces_nothing(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    refused = dualstream("export", tmp_path / "out", "--base", "maker/base", capsys=capsys, status=2)
    assert "exists" in json.dumps(refused) and not list((tmp_path / "out").iterdir())


def test_a_lora_is_a_repository_of_its_own_and_goes_on_top_of_our_class_with_a_decoder(
    hub, base, decoder, tmp_path, capsys
):
    pytest.importorskip("trl")
    from peft import PeftModel

    (decoder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: dualstream\ntags: [a]\n---\n# A decoder\n"
    )
    dualstream("release", "model", decoder, "someone/decoder", capsys=capsys)
    train = {
        "model": "maker/base", "model_revision": base, "output_dir": tmp_path / "run", "train_vision": "frozen",
        "train_connector": "lora", "train_llm": "lora", "lora_r": 2, "merge": "false", "max_train_rows": 8,
        "max_eval_rows": 4, "max_steps": 3, "per_device_train_batch_size": 4, "eval_strategy": "no",
        "learning_rate": 0.05, "save_strategy": "no", "warmup_steps": 0,
    }  # fmt: skip
    options = [str(part) for name, value in train.items() for part in (f"--{name}", value)]
    record = dualstream("train", "sft", "--config", "tiny-qwen2-vl-lora", *options, capsys=capsys)
    adapter = Path(record["release"])
    assert not (adapter / "model.safetensors").exists()
    dualstream("card", adapter, "--name", "lora", capsys=capsys)
    text = (adapter / "README.md").read_text()
    assert "base_model: maker/base" in text and "library_name: peft" in text and "license: apache-2.0" in text
    dualstream("release", "model", adapter, "someone/lora", capsys=capsys)
    assert sum(map(len, hub.files("someone/lora").values())) < 1_000_000

    model, processor = load_model("maker/base", decoder="someone/decoder", device="cpu", revision=base)
    inputs = chat_inputs(processor)
    plain = model(**inputs).logits
    tuned = PeftModel.from_pretrained(model, "someone/lora", revision="v0.1.0").eval()
    there = tuned(**inputs).logits
    stock, _ = load_model("maker/base", visual_decoder=False, device="cpu", revision=base)
    local = PeftModel.from_pretrained(stock, adapter).eval()(**inputs).logits
    assert torch.allclose(there, local, atol=1e-5) and not torch.allclose(there, plain, atol=1e-2)
    output = tuned.generate(**inputs, compression="rle", max_new_tokens=2)
    assert model.last_compression.kept_tokens < model.last_compression.visual_tokens and len(output) == 1
