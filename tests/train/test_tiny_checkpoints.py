"""The embedded checkpoints: small, stock, described, and right on scenes they have not seen."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualstream.eval.result_tables import arm_table, cell_table, kind_table
from dualstream.eval.scene_questions import answer_items, draw_items
from dualstream.modeling import default_model_path
from dualstream.train.tiny import TinyTrainer, load_config
from dualstream.train.tiny_card import decoder_section, measure_cells

NAMES = {"tiny-llava": "llava", "tiny-qwen2-vl": "qwen2_vl"}
LEAST_ACCURACY = {"tiny-llava": 0.9, "tiny-qwen2-vl": 0.8}
RECIPES = Path(__file__).parents[2] / "train"


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request):
    folder = Path(default_model_path(request.param))
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    return folder, model.eval(), AutoProcessor.from_pretrained(folder), info


def test_all_tensors_are_used(checkpoint):
    folder, model, _, info = checkpoint
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_both_together_are_small():
    files = [file for name in NAMES for file in Path(default_model_path(name)).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_recipe_makes_this_architecture(checkpoint, tmp_path):
    folder, model, processor, _ = checkpoint
    trainer = TinyTrainer(load_config(RECIPES / f"tiny_{NAMES[folder.name]}.yaml"), tmp_path)
    made = trainer.objective.model
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert processor.tokenizer.get_vocab() == trainer.processor.tokenizer.get_vocab()


def test_card_is_valid_and_complete(checkpoint):
    folder = checkpoint[0]
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text" and front["license"] == "apache-2.0"
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert {row["arm"] for row in figures["arms"]} >= {"full", "rle", "rle_drop_top1", "rle_drop_top2"}
    assert "$" not in text and "read-out objective" in text.lower()


def test_figures_of_the_card_are_those_of_the_records(checkpoint):
    folder = checkpoint[0]
    text = (folder / "README.md").read_text(encoding="utf-8")
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for table in (kind_table(figures["arms"]), arm_table(figures["arms"]), cell_table(figures["cells"])):
        assert table in text
    assert decoder_section(folder / "distillation.json") in text


@pytest.mark.slow
def test_held_out_answers(checkpoint):
    folder, model, processor, _ = checkpoint
    items = draw_items(120, "validation", seed=3, image_size=192)
    rows = answer_items(model, processor, items, methods=("rle",), batch_size=40)
    accuracy = {
        arm: sum(r["correct"] for r in rows if r["arm"] == arm) / 120 for arm in ("full", "rle", "other picture")
    }
    assert accuracy["full"] >= LEAST_ACCURACY[folder.name]
    assert accuracy["rle"] >= accuracy["full"] - 0.05
    assert accuracy["other picture"] <= 0.6
    kept = [(row["visual_tokens"], row["kept_tokens"]) for row in rows if row["arm"] == "rle"]
    assert all(visual == 64 for visual, _ in kept)
    assert sum(k for _, k in kept) <= 0.8 * 64 * len(kept)


@pytest.mark.slow
def test_held_out_cells_are_readable(checkpoint):
    _, model, processor, _ = checkpoint
    cells = measure_cells(model, processor, scenes=30, split="validation")
    for place in cells.values():
        assert place["readable"]["value"] > 0.85
        assert place["control"]["value"] < 0.4
