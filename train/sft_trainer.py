"""Supervised fine-tuning of a vision-language model on the tokens of its answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from dualstream.modeling import compressing, family_of

from .run_folder import mark_complete
from .sft_collator import IGNORED, AnswerCollator
from .sft_config import VisionSFTConfig
from .sft_parts import PartRow, base_model
from .sft_weights import load_trained, save_trained

FIGURES = ("nll", "tokens", "right_tokens", "right_answer")  # per row


class VisionSFTTrainer(SFTTrainer):
    """TRL's SFT trainer with another loss and its own checkpoints.

    The loss is the mean negative log-likelihood over the answers' tokens of the whole update, computed through the
    model's own ``forward``: TRL's fused output head calls the backbone instead, so that prompts would not be
    compressed. It is the same however an update is split over accumulation steps and processes.

    Checkpoints count only when all processes have finished them, and are read back by name; see ``sft_weights``.

    Args:
        model: a supported model, possibly wrapped by PEFT; what requires gradients is trained.
        args: settings.
        train_dataset: rows with ``messages`` and ``images``.
        eval_dataset: rows to validate on.
        processing_class: the model's processor.
        callbacks: further callbacks.

    Attributes:
        trained: the table of what is trained, for the record.
    """

    args: VisionSFTConfig
    trained: Sequence[PartRow] = ()
    # The loss is already divided by the tokens of the whole update.
    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]

    def __init__(
        self,
        model: Any,
        args: VisionSFTConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        inner = base_model(model)
        ends = inner.generation_config.eos_token_id
        collator = AnswerCollator(
            processing_class,
            [] if ends is None else [ends] if isinstance(ends, int) else ends,
            family_of(inner).image_token_id(inner.config),
            args.max_length,
        )
        own_forward = inner.__dict__.get("forward")
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[StepBar(), *(callbacks or [])],
        )
        # Take back the forward that TRL put onto the model for its fused head.
        inner.__dict__.pop("forward", None)
        if own_forward is not None:
            inner.__dict__["forward"] = own_forward
        for callback in (PrinterCallback, ProgressCallback):  # both write to stdout
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the answers' tokens of an update
        self._loss_shifts_labels = True
        self._figures: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._kept: list[tuple[int, int]] = []

    @property
    def inner(self) -> Any:
        """The transformers model in whatever it is wrapped."""
        return base_model(self.accelerator.unwrap_model(self.model))

    # --- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over the answers' tokens of this batch, divided by those of the whole update.

        Processes average their gradients, hence the factor of their number.
        """
        labels = inputs["labels"]
        others = {name: value for name, value in inputs.items() if name != "labels"}
        # Answers stand at the right edge, which compressed prompts keep: only their columns are scored.
        columns = answer_columns(labels)
        outputs = model(**others, use_cache=False, logits_to_keep=columns)
        nll, right = answer_losses(outputs.logits, labels[:, -columns:])
        self._note(nll, right, labels[:, -columns:])
        if num_items_in_batch is None:
            loss = nll.sum() / (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        else:
            loss = nll.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _note(self, nll: torch.Tensor, right: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep this batch's figures for the next log line, without repeated rows of a filled-up last batch."""
        scored = labels[:, 1:] != IGNORED
        rows = [nll.detach().sum(1), scored.sum(1), right.sum(1), (right | ~scored).all(1)]
        figures = torch.stack([row.float() for row in rows], dim=1)
        mode = "train" if self.model.training else "eval"
        self._figures[mode].append(self.accelerator.gather_for_metrics(figures).cpu())
        report = getattr(self.inner, "last_compression", None)
        if report is not None and self.model.training:
            self._kept.append((report.kept_tokens, report.visual_tokens))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy of tokens and of whole answers, each the likeliest given what is right before it.

        In validation the loss becomes the mean over all tokens instead of over the batches' means.
        """
        mode = "train" if self.model.training else "eval"
        collected, self._figures[mode] = self._figures[mode], []
        if collected:
            rows = torch.cat(collected).double()
            nll, tokens, right, answers = rows.sum(0).tolist()
            prefix = "" if mode == "train" else "eval_"
            logs |= {f"{prefix}token_accuracy": right / tokens, f"{prefix}answer_accuracy": answers / len(rows)}
            if mode == "eval":
                logs["eval_loss"] = nll / tokens
        if self._kept and mode == "train":
            kept, visual = map(sum, zip(*self._kept, strict=True))
            self._kept = []
            logs["kept_visual_tokens"] = kept / max(visual, 1)
        super(SFTTrainer, self).log(logs, start_time)

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write weights and processor; called by the process that saves."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model), folder)
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super(SFTTrainer, self)._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:  # only now an older checkpoint may go
            folder = Path(str(self.args.output_dir))
            mark_complete(folder / f"checkpoint-{self.state.global_step}", step=self.state.global_step)
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def answer_columns(labels: torch.Tensor) -> int:
    """How many columns from the right predict or hold a label: (B, L) labels, at least one of them not -100."""
    first = int((labels != IGNORED).any(0).nonzero()[0])
    return labels.shape[1] - first + 1


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score next tokens.

    Args:
        logits: (B, K, V) of the last K columns.
        labels: (B, K) of the same columns.

    Returns:
        (B, K - 1) negative log-likelihoods, 0 without a label; and whether the likeliest token is the label.
    """
    scores, targets = logits[:, :-1].float(), labels[:, 1:].to(logits.device)
    nll = nn.functional.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return nll, scores.argmax(-1) == targets


@contextmanager
def compressed(model: Any, choice: str | None, tokenizer: Any) -> Iterator[None]:
    """Train on compressed prompts for the length of a ``with`` block; None leaves the model's own default."""
    with nullcontext() if choice is None else compressing(model, choice, tokenizer=tokenizer):
        yield


class StepBar(TrainerCallback):
    """A progress bar on stderr, with the loss."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="sft", unit="step", disable=None)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        figures = {name: value for name, value in (kwargs.get("logs") or {}).items() if name in ("loss", "eval_loss")}
        if self.bar is not None and all(math.isfinite(value) for value in figures.values()):
            self.bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        if self.bar is not None:
            self.bar.close()
