"""Settings of a visual decoder distillation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .distillation_loss import check_strengths
from .distillation_settings import DECODER_KINDS, UNREADABLE, DistillationSettings
from .run_folder import NOT_PART_OF_A_RUN


@dataclass
class DistillationConfig(DistillationSettings, TrainingArguments):
    """Everything a run of ``VisualDecoderDistillationTrainer`` depends on; a YAML file holds the same names.

    The fields of ``DistillationSettings`` come on top of those of ``transformers.TrainingArguments``. Below are the
    defaults that differ from there: cosine schedule, weight decay 0.01, evaluation and checkpoints every 250 steps,
    the best checkpoint is the result, two checkpoints are kept, no reports to trackers.
    """

    output_dir: str | None = field(default="runs/distill", metadata={"help": "the run folder"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "the schedule after the warm-up"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the training images"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to validate: no, steps or epoch"})
    eval_steps: float | None = field(default=250, metadata={"help": "steps between validations"})
    save_strategy: str = field(default="steps", metadata={"help": "when to write a checkpoint, as eval_strategy"})
    save_steps: float = field(default=250, metadata={"help": "steps between checkpoints, as eval_steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept, at least 2"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "the best checkpoint is the result"})
    metric_for_best_model: str | None = field(
        default="agreement", metadata={"help": "a validation figure: agreement, boundary_f1, loss, ..."}
    )
    logging_steps: float = field(default=25, metadata={"help": "steps between lines of the log"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step too"})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the parser of options reads the parts in this order)
        default="none", metadata={"help": "trackers, e.g. tensorboard, wandb"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "pictures have no columns"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every weight is used"})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "the tables do not change"})

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: naming the field, what was given and what is accepted.
        """
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
        check_strengths(self.alpha, self.temperature)
        _require_choice("decoder_kind", self.decoder_kind, DECODER_KINDS)
        _require_choice("unreadable_images", self.unreadable_images, UNREADABLE)
        least = {"loss_chunk_size": 1, "max_classes": 2, "num_eval_images": 1, "save_total_limit": 2}
        least |= {"class_images": 1, "max_train_images": 1, "early_stopping_patience": 1, "teacher_depth": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value} must be at least {bound}.")
        if self.fp16 or self.bf16:
            raise ValueError(
                "fp16 and bf16 must be off: the decoder's weights and its loss are float32. The teacher's precision "
                "is model_dtype."
            )
        if self.load_best_model_at_end and self.save_steps != self.eval_steps and self.save_strategy == "steps":
            raise ValueError(
                f"save_steps={self.save_steps} must equal eval_steps={self.eval_steps}: the best checkpoint can only "
                "be kept if every validated state is saved."
            )
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end=True.")

    def run_settings(self) -> dict[str, Any]:
        """Return what identifies a run, JSON-serialisable: a second start with other values is another run."""
        return {name: value for name, value in self.to_dict().items() if name not in NOT_PART_OF_A_RUN}


def _require_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not accepted; accepted are {', '.join(accepted)}.")
