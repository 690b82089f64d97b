"""Settings of a visual decoder distillation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .distillation_loss import check_strengths
from .run_folder import NOT_PART_OF_A_RUN

DECODER_KINDS = ("linear", "factored", "pruned")
UNREADABLE = ("skip", "error")


@dataclass
class DistillationConfig(TrainingArguments):
    """Everything a run of ``VisualDecoderDistillationTrainer`` depends on; a YAML file holds the same names.

    The fields below come on top of those of ``transformers.TrainingArguments``. Defaults that differ from there:
    cosine schedule, weight decay 0.01, evaluation and checkpoints every 250 steps, the best checkpoint is the result,
    two checkpoints are kept, no reports to trackers.
    """

    # --- what is distilled
    model: str = field(default="tiny-llava", metadata={"help": "embedded name, folder or Hub id of the model"})
    model_revision: str | None = field(default=None, metadata={"help": "its revision on the Hub"})
    model_dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16, float16"})
    decoder_kind: str = field(default="linear", metadata={"help": f"one of {', '.join(DECODER_KINDS)}"})
    max_classes: int = field(default=4096, metadata={"help": "largest number of classes of a pruned decoder"})
    class_images: int | None = field(
        default=None, metadata={"help": "training images whose readings decide the classes of a pruned decoder: all"}
    )
    # --- teacher and loss
    teacher_depth: int | None = field(
        default=None, metadata={"help": "language-model blocks the teacher runs; all of them if not given"}
    )
    final_norm: bool = field(default=True, metadata={"help": "apply the final norm to the teacher's states"})
    alpha: float = field(default=0.7, metadata={"help": "share of the soft term (KL) in the loss, 0..1"})
    temperature: float = field(default=2.5, metadata={"help": "temperature of the soft term, tau > 0"})
    loss_chunk_size: int = field(default=1024, metadata={"help": "image positions scored over the vocabulary at once"})
    # --- images
    train_images: str = field(
        default="scenes:train:2000",
        metadata={"help": "a folder, a parquet file or folder, a Hub dataset, or scenes:SPLIT:N[:PIXELS]"},
    )
    eval_images: str | None = field(
        default=None, metadata={"help": "the same, for validation; if not given, training images are held out"}
    )
    test_images: str | None = field(
        default=None, metadata={"help": "the same, measured once at the end; if not given, validation is measured"}
    )
    num_eval_images: int = field(default=1000, metadata={"help": "most validation images"})
    max_train_images: int | None = field(default=None, metadata={"help": "most training images"})
    image_split: str = field(default="train", metadata={"help": "split of a dataset that holds the images"})
    image_column: str | None = field(default=None, metadata={"help": "its image column; the only one if not given"})
    unreadable_images: str = field(default="skip", metadata={"help": f"one of {', '.join(UNREADABLE)}"})
    # --- when to stop
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations without a better figure after which training stops"}
    )
    # --- defaults that differ from TrainingArguments
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
