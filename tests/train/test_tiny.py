"""The recipe: configs, curriculum, exact resumption, exported checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualstream.train import tiny
from dualstream.train.tiny import Phase, TinyTrainConfig, TinyTrainer, load_config, train
from dualstream.train.tiny_models import TinyModelConfig
from dualstream.train.tiny_objective import Compression

RECIPES = sorted(Path(tiny.__file__).parent.glob("tiny_*.yaml"))
SIZES = {
    "vision_width": 24,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_ratio": 2,
    "width": 32,
    "depth": 2,
    "mlp": 48,
}


def micro(family, **changes):
    grids = {"grids": [(6, 9)], "grid_share": 0.5} if family == "qwen2_vl" else {}
    settings = {
        "vision_steps": 2,
        "vision_batch": 2,
        "steps": 4,
        "batch_size": 2,
        "compress_from": 0.25,
        "compress_share": 0.7,
        "log_every": 1,
        "eval_every": 6,
        "eval_images": 2,
        "save_every": 3,
        "bf16": False,
        **grids,
        **changes,
    }
    mix = {"presence": 1.0, "relation": 1.0, "caption": 0.5}
    return TinyTrainConfig(model=TinyModelConfig(family=family, **SIZES), curriculum=[Phase(1.0, mix)], **settings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path):
    config = load_config(path)
    assert config.curriculum[-1].until == 1.0
    assert set(config.weights) == {"answer", "connector", "lens", "probe", "named", "compared"}
    assert config.lr < 0.1


def test_unknown_fields_are_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {family: llava}\ncurriculum: []\nlearning_rate: 1\n")
    with pytest.raises(ValueError, match="learning_rate"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="family is 'clip'"):
        TinyModelConfig(family="clip")
    with pytest.raises(ValueError, match="image_size is 100"):
        TinyModelConfig(image_size=100)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_killed_run_continues_exactly(family, tmp_path):
    train(micro(family), tmp_path / "whole")
    trainer = TinyTrainer(micro(family), tmp_path / "broken")
    for _ in range(3):  # one step into the second stage, then lose the process
        trainer.train_step()
    trainer.save_state()
    trainer.train_step()
    train(micro(family), tmp_path / "broken")

    whole, broken = (TinyTrainer(micro(family), tmp_path / name) for name in ("whole", "broken"))
    assert whole.step == broken.step == 6
    for (name, a), b in zip(whole.objective.state_dict().items(), broken.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("checkpoint.*"))


@pytest.mark.parametrize(("family", "auto_class"), [("llava", "Llava"), ("qwen2_vl", "Qwen2VL")])
def test_exports_are_stock_checkpoints(family, auto_class, tmp_path):
    trainer = TinyTrainer(micro(family), tmp_path)
    folder = trainer.export()
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == f"{auto_class}ForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in trainer.objective.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == f"{auto_class}Processor"
    assert not [name for name in model.state_dict() if "probe" in name]


def test_log_and_validation_lines(tmp_path):
    train(micro("llava"), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "total" in row] == [1, 2, 3, 4, 5, 6]
    assert {row["validation"] for row in rows if "validation" in row} == {"none", "rle"}


def test_stages_learning_rate_and_curriculum(tmp_path):
    config = micro("llava", vision_steps=100, steps=200, warmup=10, lr=1.0)
    config.curriculum = [Phase(0.5, {"presence": 1.0}), Phase(1.0, {"relation": 1.0})]
    trainer = TinyTrainer(config, tmp_path)
    rates = [trainer.learning_rate(step) for step in range(300)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[99] < 0.05
    assert rates[100] == pytest.approx(0.1) and rates[110] == pytest.approx(1.0) and rates[299] < 0.05
    assert trainer.mix(0) == {"presence": 1.0} and trainer.mix(150) == {"relation": 1.0}
    early = [trainer.batch(step)[1] for step in range(20)]
    late = [trainer.batch(step)[1] for step in range(60, 100)]
    assert early == [None] * 20
    assert None in late and Compression() in late and Compression(drop=True) in late
