"""The fine-tuning trainer in this process: equal updates, compression that is active, exact reloading, releases."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from dualstream.cli import main
from dualstream.modeling import RopeScaling, family_of, load_model
from dualstream.train.run_folder import last_complete_checkpoint
from dualstream.train.sft import fine_tune, make_trainer, read_config, train
from dualstream.train.sft_collator import AnswerCollator
from dualstream.train.sft_parts import base_model
from dualstream.train.sft_trainer import VisionSFTTrainer
from dualstream.train.sft_weights import load_trained, save_trained

SMALL = {
    "max_train_rows": 16,
    "max_eval_rows": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "warmup_steps": 0,
    "learning_rate": 1e-3,
}
MIXED = {"train_vision": "lora", "train_connector": "full", "train_llm": "lora", "lora_r": 4}
ALL_LORA = ("--train_vision", "lora", "--train_connector", "lora", "--train_llm", "lora")
# Adam divides by the size of a gradient and turns rounding into steps where it vanishes; plain descent does not.
DESCENT = {"optim": "sgd", "learning_rate": 0.03}
LORA = {"train_vision": "lora", "train_connector": "lora", "train_llm": "lora", "lora_r": 4}


@pytest.fixture
def configure(tmp_path):
    def build(name="run", **options):
        options = {**SMALL, "output_dir": tmp_path / name, **options}
        return read_config("tiny-qwen2-vl", [part for k, v in options.items() for part in (f"--{k}", str(v))])

    return build


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def trained(config):
    trainer = make_trainer(config)
    before = weights(trainer.inner)
    train(trainer)
    assert largest_difference(before, weights(trainer.inner)) > 1e-4
    return trainer


def test_an_update_is_the_same_however_it_is_split(configure):
    whole = trained(configure("a", **DESCENT))
    parts = trained(configure("b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **DESCENT))
    assert largest_difference(weights(whole.inner), weights(parts.inner)) < 3e-6
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_loss_is_that_of_the_answers_alone(configure):
    trainer = trained(configure())
    fresh = make_trainer(configure("again"))
    rows = next(iter(fresh.get_train_dataloader()))
    with torch.no_grad():
        loss = fresh.inner(**rows).loss  # transformers' own, on the collator's labels
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


class Counter:
    """Counts the columns that reach the first block of the language model, and those given to the model."""

    def __init__(self, model):
        self.reached, self.given, inner = [], [], base_model(model)
        block = family_of(inner).llm_blocks(inner)[0]
        block.register_forward_pre_hook(lambda module, args: self.reached.append(args[0].shape[1]))


@pytest.mark.parametrize("options", [{}, {"visual_decoder": True}, MIXED], ids=["stock", "ours", "lora"])
def test_compression_is_active_in_training(configure, options):
    trainer = make_trainer(configure(compression="rle", **options))
    counter, stock = Counter(trainer.model), type(trainer.inner)
    train(trainer)
    given = trainer.data_collator([trainer.train_dataset[0]])["input_ids"].shape[1]
    assert len(counter.reached) == SMALL["max_steps"]
    assert max(counter.reached) < given - 10
    kept = [row["kept_visual_tokens"] for row in trainer.state.log_history if "kept_visual_tokens" in row]
    assert len(kept) == 2 and all(0 < share < 0.9 for share in kept)
    assert type(trainer.inner) is stock and "forward" not in vars(trainer.inner)


def test_without_compression_every_token_reaches_the_model(configure):
    trainer = make_trainer(configure())
    counter = Counter(trainer.model)
    train(trainer)
    rows = [trainer.train_dataset[i] for i in range(4)]
    assert min(counter.reached) >= min(trainer.data_collator([row])["input_ids"].shape[1] for row in rows)
    assert not any("kept_visual_tokens" in row for row in trainer.state.log_history)


@pytest.mark.parametrize(
    "options", [{}, MIXED, LORA, {"rope_scaling": "table:99:8"}], ids=["full", "mixed", "lora", "table"]
)
def test_a_checkpoint_restores_every_weight_exactly(configure, tmp_path, options):
    trainer = trained(configure(**options))
    save_trained(trainer.model, tmp_path / "saved")
    again = make_trainer(configure("again", **options))
    assert largest_difference(weights(trainer.model), weights(again.model)) > 0
    load_trained(again.model, tmp_path / "saved")
    assert largest_difference(weights(trainer.model), weights(again.model)) == 0


def test_a_checkpoint_of_another_choice_is_refused(configure, tmp_path):
    full, mixed = make_trainer(configure()), make_trainer(configure("b", **MIXED))
    save_trained(full.model, tmp_path / "full")
    save_trained(mixed.model, tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_trained(mixed.model, tmp_path / "full")
    with pytest.raises(ValueError, match=r": model\.safetensors is missing"):
        load_trained(full.model, tmp_path / "mixed")
    (tmp_path / "mixed" / "trained_beside_adapter.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 6 weight"):
        load_trained(mixed.model, tmp_path / "mixed")


def test_tied_weights_come_back(tiny_models, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        stock = tiny_models.build_tiny_model("qwen2_vl")
        stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = True
        return type(stock)(stock.config)

    first, second = build(0), build(1)
    save_trained(first, tmp_path)
    assert largest_difference(weights(first), weights(second)) > 0
    load_trained(second, tmp_path)
    assert largest_difference(weights(first), weights(second)) == 0
    assert second.lm_head.weight is second.get_input_embeddings().weight


@pytest.mark.parametrize("options", [{}, MIXED], ids=["full", "mixed"])
def test_the_best_weights_are_kept_not_the_last(configure, monkeypatch, options):
    """The validation loss is made to grow, so that the first checkpoint is the best of three."""
    evaluate = VisionSFTTrainer.evaluate

    def worse_and_worse(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    monkeypatch.setattr(VisionSFTTrainer, "evaluate", worse_and_worse)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 2}
    config = configure(**{**options, **steps, **best})
    trainer = make_trainer(config)
    train(trainer)
    folder = Path(config.output_dir)
    assert trainer.state.best_global_step == 1
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    kept = weights(trainer.model)
    load_trained(trainer.model, folder / "checkpoint-3")
    assert largest_difference(kept, weights(trainer.model)) > 1e-4
    load_trained(trainer.model, folder / "checkpoint-1")
    assert largest_difference(kept, weights(trainer.model)) == 0


def test_validation_figures_are_means_over_all_rows(configure):
    """Seven rows in batches of four: the same as in one batch."""
    figures = []
    for size in (4, 7):
        trainer = make_trainer(
            configure(f"b{size}", max_eval_rows=7, per_device_eval_batch_size=size, eval_strategy="steps")
        )
        figures.append({k: v for k, v in trainer.evaluate().items() if "accuracy" in k or k == "eval_loss"})
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert set(figures[0]) == {"eval_loss", "eval_token_accuracy", "eval_answer_accuracy"}
    assert figures[0]["eval_answer_accuracy"] * 7 == pytest.approx(round(figures[0]["eval_answer_accuracy"] * 7))


def test_the_release_answers_as_the_trained_model_at_the_resolution_of_training(configure):
    config = configure(**LORA, min_pixels=2000, max_pixels=5000, rope_scaling="poly:9:4")
    trainer = make_trainer(config)
    train(trainer)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).logits
    record = fine_tune(config)  # from the start, in the same way
    assert record["facts"]["image_size"] == {"shortest_edge": 2000, "longest_edge": 5000}
    assert [row["mode"] for row in record["trained"]] == ["lora"] * 3
    model, processor = load_model(record["release"], device="cpu")
    assert type(model).__name__ == "Qwen2VLRopeScaled"
    assert str(RopeScaling.from_any(model.config.vision_rope_scaling)) == "poly:9:4"
    inputs = AnswerCollator(processor, [], family_of(model).image_token_id(model.config))([trainer.train_dataset[0]])
    assert torch.equal(inputs["image_grid_thw"], batch["image_grid_thw"])
    assert int(inputs["image_grid_thw"].prod()) * 36 <= 5000
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-3)


def test_an_adapter_can_be_released_unmerged(configure):
    config = configure(**LORA, merge=False)
    record = fine_tune(config)
    release = Path(record["release"])
    assert (release / "adapter_config.json").is_file() and not (release / "model.safetensors").exists()
    model = AutoModelForImageTextToText.from_pretrained(release)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_B")]
    assert any(name.endswith("attn.qkv") for name in adapted)
    largest = max(float(model.get_submodule(name).lora_B["default"].weight.abs().max()) for name in adapted)
    assert largest > 1e-4


def test_activation_checkpointing_changes_nothing_and_reaches_the_tower(configure):
    plain, saving = (trained(configure(f"{on}", **LORA, activation_checkpointing=on)) for on in (False, True))
    assert saving.inner.is_activation_checkpointing
    assert largest_difference(weights(plain.model), weights(saving.model)) < 1e-5
    tower = [p for n, p in saving.model.named_parameters() if ".visual.blocks.0." in n and ".lora_B" in n]
    assert tower and all(float(p.detach().abs().max()) > 0 for p in tower)


def test_llava_is_trained_and_released_too(configure):
    record = fine_tune(configure(model="tiny-llava", max_steps=1, compression="rle", train_vision="lora", bf16=True))
    assert record["facts"]["model_class"] == "LlavaForConditionalGeneration"
    assert 0 < record["log"][0]["kept_visual_tokens"] < 1
    model, info = AutoModelForImageTextToText.from_pretrained(record["release"], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32  # as the checkpoint it began with


def test_processes_that_do_not_know_of_each_other_are_stopped(configure, monkeypatch):
    config = configure()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true"):
        fine_tune(config)


def test_a_finished_run_is_reported_and_another_configuration_refused(configure, tmp_path):
    first = fine_tune(configure())
    weights_file = Path(first["release"]) / "model.safetensors"
    before = weights_file.stat().st_mtime_ns
    assert fine_tune(configure()) == json.loads((tmp_path / "run" / "sft.json").read_text(encoding="utf-8"))
    assert weights_file.stat().st_mtime_ns == before
    assert not list(Path(first["release"]).glob("*.bin")) and not list(Path(first["release"]).glob("*.pt"))
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 there, 0\.5 now"):
        fine_tune(configure(learning_rate=0.5))


def test_a_half_written_checkpoint_is_removed(configure, tmp_path):
    config = configure(save_strategy="steps", save_steps=1, max_steps=2)
    trainer = make_trainer(config)
    train(trainer)
    folder = tmp_path / "run"
    (folder / "checkpoint-2" / "complete.json").unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-1"
    assert not (folder / "checkpoint-2").exists()


ROWS = datasets.Features(
    {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
)


@pytest.fixture
def folders(tmp_path):
    """A data set without pictures, one without rows of pictures, and a folder that holds something else."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, columns in {"no_images": {}, "texts": {"images": [["x"]]}}.items():
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict({"messages": [messages], **columns}).to_parquet(tmp_path / name / "train.parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dataset", "nowhere"), "neither a folder, nor a Hub data set"),
        (("--dataset", "{tmp}/no_images", "--dataset_config", "default"), "no column 'images'; it has messages"),
        (("--dataset", "{tmp}/texts", "--dataset_config", "default"), "needed is a list of Image"),
        (("--dataset", "{tmp}/texts", "--dataset_config", "spatial"), "dataset_config='spatial'"),
        (("--dataset", "{tmp}/texts", "--dataset_config", "default", "--train_split", "dev"), "no split 'dev'"),
        (("--dataset_config", "everything"), "known are spatial, non_spatial"),
        (("--dataset", "scenes:big"), "side of the pictures"),
        (("--output_dir", "{tmp}/mine"), "holds no run of this command"),
        (("--train_vision", "some"), "accepted are frozen, full, lora"),
        (("--train_vision", "frozen", "--train_connector", "frozen", "--train_llm", "frozen"), "nothing to train"),
        (("--train_llm", "lora", "--lora_targets", "qkv"), "no layer of the llm"),
        (("--model", "tiny-llava", "--max_pixels", "5000"), "fixed resolution"),
        (("--max_pixels", "500"), "is above max_pixels=500"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--packing", "true"), "packing=True is not supported"),
        (("--base_dtype", "bfloat16"), "needs bf16=true"),
        (("--merge", "false"), "merge=false"),
        (("--merge", "false", *ALL_LORA, "--rope_scaling", "poly"), "merge=false"),
        (("--rope_scaling", "spiral"), "spiral"),
        (("--model", "tiny-llava", "--rope_scaling", "poly"), "needs a vision tower with a rotary table"),
        (("--compression", "zip"), "zip"),
        (("--max_length", "40"), "max_length=40 would cut"),
        (("--no_such_setting", "1"), "no_such_setting"),
        (("--eval_strategy", "steps", "--eval_split", "none"), "eval_split"),
    ],
)
def test_bad_settings_are_explained(folders, capsys, options, words):
    options = [option.format(tmp=folders) for option in options]
    base = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    out = ["--output_dir", str(folders / "run")] if "--output_dir" not in options else []
    code = main(["train", "sft", "--config", "tiny-qwen2-vl", *base, *out, *options, "--json"])
    captured = capsys.readouterr()
    assert code == 2
    assert words in json.loads(captured.out)["error"]


def test_presets_are_complete_and_a_missing_one_is_named():
    from dualstream.train.sft import PRESETS

    assert set(PRESETS) == {"tiny-qwen2-vl", "tiny-qwen2-vl-lora", "qwen2.5-vl-7b-lora"}
    for name in PRESETS:
        config = read_config(name, ["--use_cpu", "true"])
        assert (config.modes["vision"] == "lora") == ("lora" in name)
    assert read_config("qwen2.5-vl-7b-lora", ["--use_cpu", "true"]).frozen_dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"qwen2\.5-vl-7b-lora"):
        read_config("absent.yaml", [])


def test_rows_may_be_given_as_a_data_set(configure):
    picture = Image.new("RGB", (96, 96), "red")
    messages = [{"role": "user", "content": "What color?"}, {"role": "assistant", "content": "red"}]
    features = datasets.Features({**ROWS, "images": datasets.List(datasets.Image())})
    rows = datasets.Dataset.from_dict({"messages": [messages] * 8, "images": [[picture]] * 8}, features=features)
    record = fine_tune(configure(), rows, rows)
    assert record["rows"] == {"train": 8, "validation": 8}
    assert load_file(Path(record["release"]) / "model.safetensors")
    assert VisionSFTTrainer.loss_is_scaled_for_ga
