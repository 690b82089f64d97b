"""Settings of a supervised fine-tuning run of a vision-language model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from .run_folder import NOT_PART_OF_A_RUN

PART_FIELDS = {"vision": "train_vision", "connector": "train_connector", "llm": "train_llm"}
MODES = ("frozen", "full", "lora")
DTYPES = ("auto", "float32", "bfloat16")
# What may differ between two starts of one run: none of it changes the weights that come out.
NOT_PART_OF_THE_RUN = (
    *NOT_PART_OF_A_RUN,
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "trackio_space_id",
    "save_steps",
    "save_strategy",
)


@dataclass
class VisionSFTConfig(SFTConfig):
    """Everything a run of ``VisionSFTTrainer`` depends on; a YAML file holds the same names.

    The fields below come on top of those of ``trl.SFTConfig``. Defaults that differ from there: nothing is truncated,
    activation checkpointing is off, validation and checkpoints every 100 steps, two checkpoints are kept.
    """

    # --- model
    model: str = field(default="tiny-qwen2-vl", metadata={"help": "embedded name, folder or Hub id of the model"})
    model_revision: str | None = field(default=None, metadata={"help": "its revision on the Hub"})
    visual_decoder: bool = field(
        default=False, metadata={"help": "train and release our class of the family, which carries a visual decoder"}
    )
    base_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of frozen weights: float32, bfloat16, or auto (bfloat16 if all that is trained is LoRA and "
            "bf16 is on). Trained weights are float32 in any case"
        },
    )
    # --- what is trained
    train_vision: str = field(default="full", metadata={"help": f"vision tower: {', '.join(MODES)}"})
    train_connector: str = field(default="full", metadata={"help": f"connector: {', '.join(MODES)}"})
    train_llm: str = field(default="full", metadata={"help": f"language model: {', '.join(MODES)}"})
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha: float = field(default=32, metadata={"help": "their scale is lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before them"})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers that get them, by the end of their names, e.g. attn.qkv q_proj; all linear layers of the "
            "parts if not given"
        },
    )
    # --- what the model sees
    min_pixels: int | None = field(
        default=None,
        metadata={"help": "smallest picture area in pixels (Qwen families); the processor's if not given"},
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "largest picture area in pixels (Qwen families); saved with the processor"}
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={"help": "scaling of the vision tower's rotary frequencies, e.g. poly:99:8; table:99:8 is learned"},
    )
    compression: str | None = field(
        default=None,
        metadata={"help": "train on compressed prompts: rle, rle_drop_top1, ..., none; the model's own if not given"},
    )
    # --- data
    dataset: str = field(
        default="scenes",
        metadata={"help": "a folder, a Hub dataset, or scenes[:PIXELS]; columns messages and images"},
    )
    dataset_config: str | None = field(default="spatial", metadata={"help": "configuration of the data set"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(default="validation", metadata={"help": "split to validate on"})
    max_train_rows: int | None = field(default=None, metadata={"help": "most rows to train on; scenes: 4000"})
    max_eval_rows: int | None = field(default=400, metadata={"help": "most rows to validate on"})
    # --- what comes out
    merge: bool = field(default=True, metadata={"help": "merge LoRA into the released weights"})
    release_dtype: str = field(
        default="auto", metadata={"help": "dtype of the released weights: float32, bfloat16, auto (the checkpoint's)"}
    )
    # --- defaults that differ from SFTConfig
    output_dir: str | None = field(default="runs/sft", metadata={"help": "the run folder"})
    max_length: int | None = field(
        default=None, metadata={"help": "longest row in tokens; a longer one is an error, nothing is ever cut"}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "the older name of activation_checkpointing, which trades speed for memory"}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the training rows"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to validate: no, steps or epoch"})
    eval_steps: float | None = field(default=100, metadata={"help": "steps between validations"})
    save_strategy: str = field(default="steps", metadata={"help": "when to write a checkpoint, as eval_strategy"})
    save_steps: float = field(default=100, metadata={"help": "steps between checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept besides the best"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "the collator picks its columns"})

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: naming the field, what was given and what is accepted.
        """
        self.disable_tqdm = True  # the command draws its own bar, on stderr
        for name in ("eval_split", "dataset_config", "rope_scaling"):  # a command line can only spell None
            if str(getattr(self, name)).lower() in ("none", "null"):
                setattr(self, name, None)
        super().__post_init__()
        for name in PART_FIELDS.values():
            _require_choice(name, getattr(self, name), MODES)
        for name in ("base_dtype", "release_dtype"):
            _require_choice(name, getattr(self, name), DTYPES)
        if all(mode == "frozen" for mode in self.modes.values()):
            raise ValueError(f"{', '.join(PART_FIELDS.values())} are all 'frozen': there is nothing to train.")
        for name in ("lora_r", "max_train_rows", "max_eval_rows", "min_pixels", "max_pixels", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not self.merge and ("full" in self.modes.values() or self.rope_scaling is not None):
            raise ValueError(
                "merge=false releases an adapter, which can hold neither a fully trained part nor a RoPE scaling; "
                "leave merge on."
            )
        if self.eval_strategy != "no" and self.eval_split is None:
            raise ValueError(f"eval_strategy={self.eval_strategy} needs an eval_split; or set eval_strategy to 'no'.")
        self._refuse_what_this_loss_cannot_do()
        self._check_precision()
        if self.rope_scaling is not None:
            from dualstream.modeling import RopeScaling

            RopeScaling.from_any(self.rope_scaling)
        if self.compression is not None:
            from dualstream.modeling import CompressionConfig

            CompressionConfig.from_any(self.compression)

    @property
    def modes(self) -> dict[str, str]:
        """Part of the model -> ``frozen``, ``full`` or ``lora``."""
        return {part: getattr(self, name) for part, name in PART_FIELDS.items()}

    @property
    def uses_lora(self) -> bool:
        """Whether any part gets LoRA matrices."""
        return "lora" in self.modes.values()

    @property
    def frozen_dtype(self) -> str:
        """Name of the dtype that the model is loaded in."""
        if self.base_dtype != "auto":
            return self.base_dtype
        return "bfloat16" if self.bf16 and "full" not in self.modes.values() else "float32"

    def run_settings(self) -> dict[str, Any]:
        """Return what identifies a run, JSON-serialisable: a second start with other values is another run."""
        settings = {name: value for name, value in self.to_dict().items() if name not in NOT_PART_OF_THE_RUN}
        return json.loads(json.dumps(settings, default=str))

    def _refuse_what_this_loss_cannot_do(self) -> None:
        expected = {
            "packing": False,
            "padding_free": False,
            "loss_type": "nll",
            "label_smoothing_factor": 0.0,
            "use_liger_kernel": False,
            "assistant_only_loss": False,
            "completion_only_loss": None,
            "fp16": False,
        }
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported: the loss is the mean over the tokens of the "
                    f"answers, computed from the model's own forward pass. Leave it at {value!r}."
                )
        if self.deepspeed or self.fsdp:
            raise ValueError("deepspeed and fsdp are not supported: start several processes with torchrun instead.")

    def _check_precision(self) -> None:
        if self.frozen_dtype == "bfloat16" and not self.bf16:
            raise ValueError("base_dtype=bfloat16 needs bf16=true: trained weights stay float32 beside it.")


def _require_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not accepted; accepted are {', '.join(accepted)}.")
