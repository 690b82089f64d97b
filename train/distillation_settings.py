"""What a distillation is told beyond ``transformers.TrainingArguments``; quick to load, for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass, field

DECODER_KINDS = ("linear", "factored", "pruned")
UNREADABLE = ("skip", "error")


@dataclass
class DistillationSettings:
    """The settings of a distillation that other trainings do not have; ``DistillationConfig`` holds all of them."""

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
