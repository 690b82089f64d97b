"""The trainer: equal updates however a batch is split, a teacher that is left alone, and when it stops."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from dualstream.modeling import VisualDecoder, family_of, load_model
from dualstream.modeling.lens import image_features_and_states
from dualstream.processing import build_inputs
from dualstream.train.distill import setting_help
from dualstream.train.distillation import (
    PatienceCallback,
    VisualDecoderDistillationTrainer,
)
from dualstream.train.distillation_config import DistillationConfig

SIZES = [(96, 96), (60, 120), (120, 60), (96, 84), (48, 48), (96, 48), (96, 96)]


def pictures(count, first=0):
    """Noise of several sizes, so that grids differ within a batch where the model lets them."""
    rng = np.random.default_rng(first)
    return [Image.fromarray(rng.integers(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8)) for i in range(count)]


def make_trainer(
    tmp_path,
    model="tiny-qwen2-vl",
    kind="linear",
    callbacks=None,
    images=7,
    random_start=True,
    dtype="auto",
    **options,
):
    """A trainer of a decoder that starts far from the teacher, so that updates are not small."""
    options = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    teacher, processor = load_model(model, device="cpu", dtype=dtype)
    decoder = VisualDecoder.initialized(kind, teacher.get_output_embeddings().weight)
    if random_start:
        torch.nn.init.normal_(decoder.own_parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return VisualDecoderDistillationTrainer(
        decoder,
        teacher,
        processor,
        DistillationConfig(output_dir=str(tmp_path / "run"), **options),
        pictures(images),
        pictures(4, first=1),
        callbacks,
    )


def test_accumulation_equals_the_big_batch(tmp_path):
    """Images of different sizes: a mean of means would weigh small ones more. The last batch is not full."""
    common = {"num_train_epochs": 2, "images": 11, "learning_rate": 2e-3}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainers = [make_trainer(tmp_path, **common, **options) for options in ({}, split)]
    start = trainers[0].decoder.weight.detach().clone()
    losses = []
    for trainer in trainers:
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    big, accumulated = (trainer.decoder.weight for trainer in trainers)
    assert trainers[0].state.global_step == trainers[1].state.global_step == 4
    assert (big - start).abs().max() > 1e-3
    torch.testing.assert_close(accumulated, big, rtol=0, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_loss_of_an_update_is_the_mean_over_its_image_positions(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, images=3)
    scores = []
    with torch.no_grad():
        for image in pictures(3):
            inputs = trainer.collator([image])
            features, states, _ = trainer.teacher_pass(inputs)
            teacher = states @ trainer.teacher_head().weight.T
            scores.append((features @ trainer.decoder.weight.T, teacher))
    student, teacher = (torch.cat(parts) for parts in zip(*scores, strict=True))
    alpha, tau = trainer.args.alpha, trainer.args.temperature
    soft = torch.nn.functional.kl_div(
        (student / tau).log_softmax(1), (teacher / tau).log_softmax(1), log_target=True, reduction="batchmean"
    )
    hard = torch.nn.functional.cross_entropy(student, teacher.argmax(1))
    trainer.train()
    assert len({tuple(s.shape) for s, _ in scores}) > 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        float(alpha * tau**2 * soft + (1 - alpha) * hard), rel=1e-4
    )


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_text_after_the_image_changes_nothing(tmp_path, name):
    trainer = make_trainer(tmp_path, model=name)
    images = pictures(3)
    expected = trainer.teacher_pass(trainer.collator(images))
    inputs = build_inputs(
        trainer.processing_class, images, ["What is this?", "Why?", "How many red squares are there?"]
    )
    inputs.pop("compression", None)
    for got, wanted in zip(trainer.teacher_pass(dict(inputs)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_teacher_depth_and_norm_are_what_the_configuration_says(tmp_path):
    plain = make_trainer(tmp_path, teacher_depth=2, final_norm=False)
    normed = make_trainer(tmp_path, teacher_depth=2)
    inputs = plain.collator(pictures(2))
    states = image_features_and_states(plain.teacher, inputs, 2)[1]
    assert torch.equal(plain.teacher_pass(inputs)[1], states)
    assert torch.equal(normed.teacher_pass(inputs)[1], family_of(plain.teacher).final_norm(plain.teacher)(states))
    with pytest.raises(ValueError, match=r"teacher_depth=9 must lie within 0\.\.5"):
        make_trainer(tmp_path, teacher_depth=9)


@pytest.mark.parametrize("kind", ["linear", "factored"])
def test_only_the_decoder_is_trained_and_saved(tmp_path, kind):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, kind=kind, **options)
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.train()
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in trained] == [id(trainer.decoder.own_parameter)]
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.state_dict().items())
    saved = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"visual_decoder.safetensors", "visual_decoder.json", "trainer_state.json", "complete.json"} <= saved
    assert not any("model" in name or "training_args" in name for name in saved)
    loaded = VisualDecoder.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(loaded.own_parameter, trainer.decoder.own_parameter)


def test_training_makes_a_random_decoder_agree(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=25, images=6, learning_rate=3e-2, alpha=0.5, temperature=1.0)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_agreement"] > before["eval_agreement"] + 0.2


def test_validation_figures_are_means_over_images(tmp_path):
    """However the images are batched; the last batch is not full."""
    one = make_trainer(tmp_path, per_device_eval_batch_size=1).evaluate()
    three = make_trainer(tmp_path, per_device_eval_batch_size=3).evaluate()
    for name in ("loss", "kl", "ce", "agreement", "top5", "boundary_f1", "meaningless_f1", "kept_ratio_difference"):
        assert three[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-5, abs=1e-6), name


def test_figures_reach_the_trackers(tmp_path):
    class Tracker(TrainerCallback):
        def __init__(self):
            self.seen = set()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen |= set(logs)

    tracker = Tracker()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, callbacks=[tracker], **options).train()
    assert {"loss", "kl", "ce", "agreement", "learning_rate", "eval_loss", "eval_boundary_f1"} <= tracker.seen


def test_stops_when_nothing_improves_and_keeps_the_best(tmp_path):
    """Steps so large that they spoil a decoder that starts well."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "metric_for_best_model": "agreement"}
    trainer = make_trainer(
        tmp_path, random_start=False, images=4, max_steps=12, num_train_epochs=12, learning_rate=30.0, **options
    )
    trainer.train()
    values = [row["eval_agreement"] for row in trainer.state.log_history if "eval_agreement" in row]
    best = values.index(max(values))
    assert len(values) == best + 3 < 12
    assert trainer.state.best_global_step == best + 1
    assert trainer.evaluate()["eval_agreement"] == pytest.approx(values[best])
    kept = VisualDecoder.from_pretrained(tmp_path / "run" / f"checkpoint-{best + 1}")
    assert torch.equal(kept.weight, trainer.decoder.weight)


@pytest.mark.parametrize(
    ("values", "greater", "stops"),
    [
        ([1, 2, 3], True, False),
        ([3, 2, 1], True, True),
        ([3, 2, 1], False, False),
        ([3, 1, 2, 1], False, True),
        ([], True, False),
    ],
)
def test_patience_counts_in_the_log(values, greater, stops):
    from types import SimpleNamespace

    state = SimpleNamespace(log_history=[{"eval_agreement": value} for value in values] + [{"loss": 1.0}])
    args = SimpleNamespace(metric_for_best_model="agreement", greater_is_better=greater)
    control = SimpleNamespace(should_training_stop=False)
    PatienceCallback(2).on_evaluate(args, state, control)
    assert control.should_training_stop is stops


@pytest.mark.parametrize("kind", ["linear", "factored"])
def test_a_half_precision_teacher_trains_a_full_precision_decoder(tmp_path, kind):
    """The result has the teacher's dtype; the weights that are trained do not."""
    trainer = make_trainer(tmp_path, kind=kind, dtype="bfloat16", images=3, max_steps=2)
    start = trainer.decoder.own_parameter.detach().clone()
    trainer.train()
    assert trainer.teacher.dtype == torch.bfloat16
    assert trainer.decoder.own_parameter.dtype == torch.float32
    assert all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert 0 < (trainer.decoder.own_parameter - start).abs().max() < 0.1
    assert not trainer.finished_decoder().own_parameter.requires_grad
    trainer.save_model(str(tmp_path / "saved"))
    saved = VisualDecoder.from_pretrained(tmp_path / "saved").own_parameter
    assert torch.equal(saved, trainer.decoder.own_parameter.bfloat16())


def test_a_decoder_of_another_model_or_precision(tmp_path):
    teacher, processor = load_model("tiny-llava", device="cpu")
    config = DistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="belongs to another model"):
        VisualDecoderDistillationTrainer(VisualDecoder(30, 8), teacher, processor, config, pictures(1))
    half = VisualDecoder.initialized("linear", teacher.get_output_embeddings().weight).bfloat16()
    with pytest.raises(ValueError, match="float32"):
        VisualDecoderDistillationTrainer(half, teacher, processor, config, pictures(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.0}, "alpha=2.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"decoder_kind": "cubic"}, "decoder_kind='cubic'.*linear, factored, pruned"),
        ({"unreadable_images": "ignore"}, "unreadable_images='ignore'.*skip, error"),
        ({"max_classes": 1}, "max_classes=1"),
        ({"save_total_limit": 1}, "save_total_limit=1"),
        ({"bf16": True}, "bf16 must be off"),
        ({"eval_steps": 5, "save_steps": 10}, "save_steps=10 must equal eval_steps=5"),
        ({"early_stopping_patience": 2, "load_best_model_at_end": False}, "early_stopping_patience needs"),
    ],
)
def test_settings_that_are_not_accepted(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_help_names_every_setting_that_is_not_of_transformers():
    own, theirs = (
        {field.name for field in dataclasses.fields(kind)} for kind in (DistillationConfig, TrainingArguments)
    )
    assert setting_help().keys() == own - theirs
    assert all(len(text) > 10 for text in setting_help().values())
