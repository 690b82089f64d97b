"""The command ``dualstream train sft``: one run folder, from a configuration to a release that others load.

    dualstream train sft --config tiny-qwen2-vl --output_dir runs/spatial
    dualstream train sft --config my.yaml --train_llm lora --rope_scaling poly:99:8

The run can be killed at any time: the same command continues it and ends with the same weights. With several
processes (on a CPU with ACCELERATE_USE_CPU=true in the environment)::

    torchrun --nproc_per_node 2 -m dualstream.cli train sft --config my.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result
from dualstream.eval.manifest import make_manifest, write_json

from .run_command import add_config_argument, presets_of, read_settings
from .run_folder import agreed_checkpoint, open_run

if TYPE_CHECKING:
    from .sft_config import VisionSFTConfig
    from .sft_trainer import VisionSFTTrainer

PASSES_OPTIONS_ON = True
PRESETS = presets_of("sft")
RESULT = "sft.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments; every field of ``VisionSFTConfig`` is an option too."""
    add_config_argument(parser, PRESETS)
    parser.epilog = (
        "Every setting is an option as well, e.g. --train_vision lora --max_steps 100 --learning_rate 1e-4; see "
        "dualstream.train.sft_config and trl.SFTConfig."
    )


def run(args: argparse.Namespace) -> Result:
    """Train, or continue a run, or report one that is finished."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        config = read_config(args.config, args.overrides)
        record = fine_tune(config)
    if int(os.environ.get("RANK", "0")):  # one process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return Result(record, _text(record))


def read_config(source: str, options: list[str]) -> VisionSFTConfig:
    """Read the settings of a run, see ``read_settings``."""
    from .sft_config import VisionSFTConfig

    return read_settings(VisionSFTConfig, source, options, PRESETS, "sft")


def fine_tune(config: VisionSFTConfig, train_rows: Any = None, eval_rows: Any = None) -> dict[str, Any]:
    """Run a fine-tuning to its end in ``config.output_dir``, from where it stands.

    Args:
        config: the settings.
        train_rows: a data set to train on instead of ``config.dataset``.
        eval_rows: with it, a data set to validate on.

    Returns:
        The record in ``sft.json``: what was trained, the log, the figures, the release and the manifest.

    Raises:
        ValueError: the folder holds another run, processes do not know of each other, or a setting does not fit.
    """
    started = time.time()
    folder, finished = open_run(config, config.run_settings(), RESULT)
    if finished is not None:
        return finished
    trainer = make_trainer(config, train_rows, eval_rows)
    checkpoint = agreed_checkpoint(folder, trainer.is_world_process_zero())
    train(trainer, checkpoint)
    record: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        record = finish(trainer, folder, started, checkpoint)
    trainer.accelerator.wait_for_everyone()
    return record


def make_trainer(
    config: VisionSFTConfig, train_rows: Any = None, eval_rows: Any = None, **options: Any
) -> VisionSFTTrainer:
    """Load model and rows, choose what is trained, and put them together.

    Args:
        config: the settings.
        train_rows: a data set instead of the configured one.
        eval_rows: with it, a data set to validate on.
        **options: passed to the trainer, e.g. ``callbacks``.

    Raises:
        ValueError: a setting does not fit the model or the data.
    """
    from transformers import set_seed

    from .sft_data import check_columns, open_rows
    from .sft_parts import add_lora, format_table, set_trained, trained_table
    from .sft_trainer import VisionSFTTrainer

    if train_rows is None:
        with config.main_process_first(desc="data"):
            train_rows, eval_rows = open_rows(config)
    else:
        check_columns(train_rows, "train_rows")
    model, processor = load_for_training(config)
    set_seed(config.seed)  # LoRA matrices start at random
    if config.uses_lora:
        lora = {name: getattr(config, name) for name in ("lora_alpha", "lora_dropout")}
        model = add_lora(model, config.modes, config.lora_targets, r=config.lora_r, **lora)
    set_trained(model, config.modes)
    table = trained_table(model, config.modes)
    if config.process_index == 0:
        print(format_table(table), file=sys.stderr)
    trainer = VisionSFTTrainer(
        model, config, train_rows, eval_dataset=eval_rows, processing_class=processor, **options
    )
    trainer.trained = table
    return trainer


def load_for_training(config: VisionSFTConfig) -> tuple[Any, Any]:
    """Load the model and its processor, with resolution and RoPE scaling set.

    Raises:
        ValueError: the model is unknown, or has no resolution or frequencies to set.
    """
    from dualstream.modeling import load_model
    from dualstream.processing import register_processors

    register_processors()
    options: dict[str, Any] = {} if config.model_revision is None else {"revision": config.model_revision}
    model, processor = load_model(
        config.model,
        device="cpu",
        dtype=config.frozen_dtype,
        visual_decoder=config.visual_decoder,
        vision_rope_scaling=config.rope_scaling,
        **options,
    )
    set_resolution(model, processor, config.min_pixels, config.max_pixels)
    return model, processor


def set_resolution(model: Any, processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Bound the area that pictures are resized to; the processor carries it into the release.

    Raises:
        ValueError: the family has a fixed resolution, or the bounds cross.
    """
    from dualstream.modeling import family_of

    if min_pixels is None and max_pixels is None:
        return
    if not family_of(model).has_mrope:
        raise ValueError(
            f"min_pixels and max_pixels: pictures of {type(model).__name__} have a fixed resolution; leave both out."
        )
    images = processor.image_processor
    low = images.size["shortest_edge"] if min_pixels is None else min_pixels
    high = images.size["longest_edge"] if max_pixels is None else max_pixels
    if low > high:
        raise ValueError(f"min_pixels={low} is above max_pixels={high}.")
    images.size = type(images.size)(shortest_edge=low, longest_edge=high)


def train(trainer: VisionSFTTrainer, checkpoint: Path | None = None) -> None:
    """Train, on compressed prompts if the settings say so, from a checkpoint if there is one."""
    from .sft_trainer import compressed

    with compressed(trainer.model, trainer.args.compression, trainer.processing_class.tokenizer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def finish(trainer: VisionSFTTrainer, folder: Path, started: float, checkpoint: Path | None) -> dict[str, Any]:
    """Write the release and the record of a run."""
    from .sft_parts import table_dict
    from .sft_release import write_release

    config, state = trainer.args, trainer.state
    train_rows: Any = trainer.train_dataset
    eval_rows: Any = trainer.eval_dataset
    validations = [row for row in state.log_history if "eval_loss" in row]
    best = next((row for row in validations if row["step"] == state.best_global_step), None)
    shown = (best if config.load_best_model_at_end else None) or (validations[-1] if validations else {})
    model = trainer.accelerator.unwrap_model(trainer.model)
    record = {
        "steps": state.global_step,
        "world_size": trainer.accelerator.num_processes,
        "rows": {"train": len(train_rows), "validation": 0 if eval_rows is None else len(eval_rows)},
        "trained": table_dict(trainer.trained),
        "facts": {
            "model_class": type(trainer.inner).__name__,
            "rope_scaling": config.rope_scaling,
            "compression": config.compression,
            "image_size": _plain(trainer.processing_class.image_processor.size),
            "frozen_dtype": config.frozen_dtype,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
        },
        "validation": {
            name.removeprefix("eval_"): value
            for name, value in shown.items()
            if name in ("eval_loss", "eval_token_accuracy", "eval_answer_accuracy")
        },
        "log": state.log_history,
        "manifest": make_manifest(config.seed, started, settings=config.run_settings()),
    }
    release = write_release(model, trainer.processing_class, config, folder, record)
    resumed = None if checkpoint is None else checkpoint.name
    record = {"output_dir": str(folder), "release": str(release), "resumed_from": resumed, **record}
    write_json(folder / RESULT, record)
    return record


def _plain(size: Any) -> dict[str, int]:
    return {name: value for name, value in dict(size).items() if value is not None}


def _text(record: dict[str, Any]) -> str:
    if not record:
        return ""
    from .sft_parts import PartRow, format_table

    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in record["validation"].items())
    return (
        f"{format_table([PartRow(**row) for row in record['trained']])}\n\n{record['steps']} steps; "
        f"validation: {figures or 'none'}\n{record['release']}: the trained model, its processor, card and record"
    )
