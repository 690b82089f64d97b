"""The command: a whole run, never over another one; settings, presets and installation."""

import json

import pytest
import yaml

from dualstream.cli import main
from dualstream.modeling import VisualDecoder, compressing, load_model
from dualstream.processing import build_inputs
from dualstream.train.distill import PRESETS, install, read_config
from dualstream.train.image_sources import open_images
from dualstream.train.run_folder import claim_folder

SETTINGS = {
    "model": "tiny-llava",
    "train_images": "scenes:train:11:48",
    "eval_images": "scenes:validation:3:48",
    "test_images": "scenes:test:4:48",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 2.0e-3,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def write_config(tmp_path):
    """Function options -> path of a YAML file with the settings above and these."""

    def write(name="run", **options):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(tmp_path / name), **options}))
        return str(path)

    return write


def test_a_run_from_configuration_to_card(write_config, tmp_path, capsys):
    config, folder = (
        write_config(decoder_kind="pruned", max_classes=8, max_steps=2, dataloader_num_workers=1),
        tmp_path / "run",
    )
    assert main(["train", "distill", "--config", config, "--learning_rate", "1e-3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["manifest"]["settings"]["learning_rate"] == 1e-3
    assert record["decoder"]["kind"] == "pruned" and record["decoder"]["classes"] <= 8
    assert record["decoder"]["coverage"]["readings"] == 11 * 64
    assert record["measured_on"] == "test" and record["images"]["test"]["images"] == 4
    for reader in ("decoder", "unembedding", "another picture"):
        estimate = record["figures"][reader]["boundary_f1"]
        assert estimate["n"] == 4 and 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    gain = record["figures"]["decoder"]["top1_gain"]["value"]
    difference = record["figures"]["decoder"]["top1"]["value"] - record["figures"]["unembedding"]["top1"]["value"]
    assert gain == pytest.approx(difference)
    card = (folder / "README.md").read_text()
    assert "plain unembedding" in card and "scenes:train:11:48" in card and "$" not in card
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "distillation.json").read_text()) == {
        k: v for k, v in record.items() if k != "output_dir"
    }
    decoder = VisualDecoder.from_pretrained(folder)
    assert decoder.model_type == "llava" and decoder.training_facts["steps"] == record["decoder"]["steps"]
    model, processor = load_model("tiny-llava", device="cpu")
    inputs = build_inputs(processor, [open_images(SETTINGS["test_images"])[0]], ["What is this?"])
    with compressing(model, method="rle", decoder=decoder):
        model.generate(**inputs, max_new_tokens=2)
        assert model.last_compression.images[0].kept_tokens < 64

    # the same command on the finished run reports it; another configuration is refused
    written = (folder / "visual_decoder.safetensors").stat().st_mtime_ns
    assert main(["train", "distill", "--config", config, "--learning_rate", "1e-3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert (folder / "visual_decoder.safetensors").stat().st_mtime_ns == written
    assert main(["train", "distill", "--config", config, "--learning_rate", "3e-3", "--json"]) == 2
    assert "another configuration (learning_rate: 0.001 there, 0.003 now)" in capsys.readouterr().err


def test_a_run_may_be_continued_with_other_workers_or_trackers(write_config, tmp_path):
    settings = [
        read_config(write_config(**options), []).run_settings()
        for options in ({}, {"dataloader_num_workers": 2, "save_total_limit": 3}, {"seed": 1})
    ]
    claim_folder(tmp_path / "run", settings[0])
    claim_folder(tmp_path / "run", settings[1])
    with pytest.raises(ValueError, match="seed: 42 there, 1 now"):
        claim_folder(tmp_path / "run", settings[2])


def test_install_puts_the_decoder_beside_the_weights(tmp_path):
    import shutil

    from dualstream.modeling import default_model_path

    checkpoint = tmp_path / "model"
    shutil.copytree(default_model_path("tiny-llava"), checkpoint)
    model, processor = load_model(checkpoint, device="cpu")
    decoder = VisualDecoder.initialized(
        "factored", model.get_output_embeddings().weight, tokenizer=processor.tokenizer
    )
    decoder.model_type = "llava"
    decoder.save_pretrained(tmp_path / "run")
    install(tmp_path / "run", checkpoint)
    loaded, _ = load_model(checkpoint, device="cpu")
    assert loaded.visual_decoder.kind == "factored"
    shutil.copytree(default_model_path("tiny-qwen2-vl"), tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        install(tmp_path / "run", tmp_path / "other")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        install(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_read(preset, tmp_path):
    config = read_config(preset, ["--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert config.output_dir == str(tmp_path)
    assert config.train_images not in (config.eval_images, config.test_images)


def test_presets_of_the_paper():
    llava, qwen = (read_config(name, ["--use_cpu", "true"]) for name in ("llava-1.5-7b", "qwen2.5-vl-7b"))
    assert (llava.alpha, llava.temperature, llava.learning_rate) == (0.7, 2.5, 1e-4)
    assert (llava.teacher_depth, llava.final_norm) == (24, False)
    assert (qwen.alpha, qwen.temperature, qwen.learning_rate) == (0.8, 5.0, 2e-4)
    assert (qwen.teacher_depth, qwen.final_norm) == (None, True)


def test_a_configuration_that_is_not_there():
    with pytest.raises(ValueError, match="neither a file nor a preset"):
        read_config("nothing.yaml", [])


def test_an_unknown_field_in_the_file(write_config):
    with pytest.raises(ValueError, match="temprature"):
        read_config(write_config(temprature=2), [])
