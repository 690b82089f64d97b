"""The command ``dualstream train distill``: one run folder, from a configuration to a decoder with its card.

    dualstream train distill --config tiny-llava --output_dir runs/tiny-llava-decoder
    dualstream train distill --config my.yaml --learning_rate 2e-4 --decoder_kind pruned

The run can be killed at any time: the same command continues it and ends with the same weights. With several
processes (on a CPU with ACCELERATE_USE_CPU=true in the environment)::

    torchrun --nproc_per_node 2 -m dualstream.cli train distill --config my.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result
from dualstream.eval.manifest import make_manifest, write_json

from .run_command import add_config_argument, presets_of, read_settings
from .run_folder import agreed_checkpoint, open_run

if TYPE_CHECKING:
    from dualstream.modeling import VisualDecoder

    from .distillation import VisualDecoderDistillationTrainer
    from .distillation_config import DistillationConfig
    from .image_dataset import ImageSets, ImageSubset

PASSES_OPTIONS_ON = True
PRESETS = presets_of("distill")
RESULT, CLASSES = "distillation.json", "classes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments; every field of ``DistillationConfig`` is an option too."""
    add_config_argument(parser, PRESETS)
    parser.add_argument(
        "--install",
        type=Path,
        metavar="FOLDER",
        help="also put the decoder beside the weights of this checkpoint, where load_model finds it",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Every setting is an option as well, e.g. --train_images photos --learning_rate 2e-4. Of a distillation:\n"
        + "\n".join(f"  --{name:24} {text}" for name, text in setting_help().items())
        + "\nand all of transformers.TrainingArguments."
    )


def setting_help() -> dict[str, str]:
    """Return name -> help of the settings that ``TrainingArguments`` does not have."""
    from .distillation_settings import DistillationSettings

    return {field.name: str(field.metadata.get("help")) for field in fields(DistillationSettings)}


def run(args: argparse.Namespace) -> Result:
    """Train, or continue a run, or report one that is finished."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        config = read_config(args.config, args.overrides)
        record = distill(config)
        main_process = int(os.environ.get("RANK", "0")) == 0
        if args.install is not None and main_process:
            install(Path(str(config.output_dir)), args.install)
    if not main_process:  # one process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return Result({}, "")
    return Result({"output_dir": config.output_dir, **record}, _text(config, record))


def read_config(source: str, options: list[str]) -> DistillationConfig:
    """Read the settings of a run, see ``read_settings``."""
    from .distillation_config import DistillationConfig

    return read_settings(DistillationConfig, source, options, PRESETS, "distill")


def distill(config: DistillationConfig) -> dict[str, Any]:
    """Run a distillation to its end in ``config.output_dir``, from where it stands.

    Returns:
        The record in ``distillation.json``: decoder, data, curves, figures and manifest.

    Raises:
        ValueError: the folder holds another run, processes do not know of each other, or a setting does not fit.
    """
    started = time.time()
    folder, finished = open_run(config, config.run_settings(), RESULT)
    if finished is not None:
        return finished
    trainer, images = make_trainer(config, folder)
    checkpoint = agreed_checkpoint(folder, trainer.is_world_process_zero())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    record: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        record = finish(trainer, images, folder, started)
    trainer.accelerator.wait_for_everyone()
    return record


def make_trainer(
    config: DistillationConfig, folder: Path, **trainer_options: Any
) -> tuple[VisualDecoderDistillationTrainer, ImageSets]:
    """Load model, images and decoder and put them together.

    Args:
        config: the settings.
        folder: keeps hashes of images and the classes of a pruned decoder for a run that is continued.
        **trainer_options: passed to the trainer, e.g. ``callbacks``.
    """
    from dualstream.modeling import load_model
    from dualstream.processing import register_processors

    from .distillation import VisualDecoderDistillationTrainer
    from .image_dataset import load_image_sets

    register_processors()
    options = {} if config.model_revision is None else {"revision": config.model_revision}
    model, processor = load_model(config.model, device=config.device, dtype=config.model_dtype, **options)
    with config.main_process_first(desc="images"):
        images = load_image_sets(config, folder)
    with config.main_process_first(desc="classes"):
        decoder = make_decoder(config, model, processor, images.train, folder)
    trainer = VisualDecoderDistillationTrainer(
        decoder,
        model,
        processor,
        args=config,
        train_dataset=images.train,
        eval_dataset=images.validation,
        **trainer_options,
    )
    return trainer, images


def make_decoder(
    config: DistillationConfig, model: Any, processor: Any, images: ImageSubset, folder: Path
) -> VisualDecoder:
    """Make the decoder a run starts from; the classes of a pruned one are chosen once and kept in the folder."""
    from dualstream.modeling import VisualDecoder

    from .decoder_classes import read_classes

    unembedding = model.get_output_embeddings().weight.detach()
    if config.decoder_kind != "pruned":
        return VisualDecoder.initialized(config.decoder_kind, unembedding, tokenizer=processor.tokenizer)
    start = folder / CLASSES
    if not start.is_dir():
        tables = read_classes(config, model, processor, images)
        decoder = VisualDecoder.initialized(
            "pruned", unembedding, tables.token_classes, tables.class_tokens, processor.tokenizer
        )
        decoder.training_facts = {"coverage": tables.coverage.to_dict()}
        unfinished = folder / f".{CLASSES}"
        decoder.save_pretrained(unfinished)
        os.replace(unfinished, start)
    return VisualDecoder.from_pretrained(start).to(model.device)


def finish(
    trainer: VisualDecoderDistillationTrainer, images: ImageSets, folder: Path, started: float
) -> dict[str, Any]:
    """Measure the trained decoder and write it, its record and its card."""
    from .distill_card import write_card
    from .distill_measure import measure

    config = trainer.args
    role, held_out = ("validation", images.validation) if images.test is None else ("test", images.test)
    decoder = trainer.finished_decoder()
    state = trainer.state
    facts = {
        "model": config.model,
        "model_revision": config.model_revision,
        "teacher_depth": trainer.depth,
        "final_norm": config.final_norm,
        "alpha": config.alpha,
        "temperature": config.temperature,
        "steps": state.best_global_step or state.global_step,
        "images": len(images.train),
        **trainer.decoder.training_facts,
    }
    decoder.training_facts, decoder.model_type = facts, trainer.family.name
    figures = measure(trainer.teacher, trainer.processing_class, held_out, decoder, config, trainer.depth)
    record = {
        "decoder": {
            "kind": decoder.kind,
            "classes": decoder.num_classes,
            "parameters": decoder.num_own_parameters,
            "multiply_adds_per_token": decoder.multiply_adds,
            **facts,
        },
        "images": images.report,
        "measured_on": role,
        "figures": figures,
        "curves": state.log_history,
        "manifest": make_manifest(config.seed, started, processes=config.world_size, settings=config.run_settings()),
    }
    decoder.save_pretrained(folder)
    write_card(folder, record)
    write_json(folder / RESULT, record)
    return record


def install(run_folder: Path, checkpoint: Path) -> None:
    """Put the decoder of a finished run beside the weights of a checkpoint.

    Raises:
        ValueError: the folder holds no model, or a model of another width or vocabulary.
    """
    from transformers import AutoConfig

    from dualstream.modeling import VisualDecoder
    from dualstream.modeling.families import stock_model_type

    decoder = VisualDecoder.from_pretrained(run_folder)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"install={checkpoint} holds no model: config.json is missing.")
    config = AutoConfig.from_pretrained(checkpoint)
    text, model_type = config.get_text_config(), stock_model_type(config.model_type)
    wanted, found = (
        (text.vocab_size, text.hidden_size, model_type),
        (decoder.vocab_size, decoder.hidden_size, decoder.model_type or model_type),
    )
    if wanted != found:
        raise ValueError(
            f"install={checkpoint} has vocabulary, width and type {wanted}, the decoder {found}: it belongs to "
            "another model."
        )
    decoder.save_pretrained(checkpoint)


def _text(config: DistillationConfig, record: dict[str, Any]) -> str:
    from .distill_card import figure_table

    return f"{figure_table(record)}\n\n{config.output_dir}: decoder, card (README.md) and record ({RESULT})"
