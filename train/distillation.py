"""Distil a visual decoder: teach it to say, before the language model runs, what the language model would read.

The frozen vision-language model is the teacher and gives both sides in one pass: the connector's features, which the
decoder reads, and the states after some of its blocks, which its own output matrix reads. Only image positions count,
and the prompt ends with the image, so no text can influence what is learnt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from dualstream.eval.reading_agreement import STUDENT_READINGS, TEACHER_READINGS, reading_agreement
from dualstream.modeling import VisualDecoder, family_of
from dualstream.modeling.lens import image_features_and_states, unwrapped
from dualstream.modeling.visual_decoder import top_k_tokens

from .distillation_config import DistillationConfig
from .distillation_loss import LossParts, TeacherHead, distillation_loss
from .image_dataset import EpochSampler, ImageCollator, Images, PaddedImages
from .run_folder import mark_complete


class DistillationObjective(nn.Module):
    """The module that is trained: a visual decoder, called for its loss.

    A module of its own, because gradients are synchronised between processes only through a module's ``forward``.

    Attributes:
        decoder: the decoder, float32, its only parameters.
    """

    def __init__(self, decoder: VisualDecoder, alpha: float, temperature: float, chunk_size: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.alpha, self.temperature, self.chunk_size = alpha, temperature, chunk_size

    def forward(
        self, features: torch.Tensor, states: torch.Tensor, head: TeacherHead
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss over image positions.

        Args:
            features: (N, d) connector output.
            states: (N, d) teacher states, normalised if the teacher is meant to be.
            head: the teacher's output matrix.

        Returns:
            The sum, a float32 scalar; and (3,) the detached sums of KL, cross-entropy and agreement.
        """
        loss, parts = distillation_loss(
            self.decoder.transformed(features),
            self.decoder.matrix(head.weight),
            states,
            head,
            alpha=self.alpha,
            temperature=self.temperature,
            token_classes=self.decoder.token_classes,
            chunk_size=self.chunk_size,
        )
        return loss, _stacked(parts)


def _stacked(parts: LossParts) -> torch.Tensor:
    return torch.stack([parts.kl, parts.ce, parts.agreement])


class VisualDecoderDistillationTrainer(Trainer):
    """Train a visual decoder against the reading of a frozen vision-language model.

    The loss is averaged over all image positions of an update: over its accumulation steps, its processes and images
    of any size, so that every way of splitting a batch gives the same update.

    Args:
        decoder: the decoder to train, float32; see ``VisualDecoder.initialized``.
        teacher: a supported model. It is frozen in place, moved to the trainer's device, and never saved.
        processing_class: its processor, with a chat template.
        args: settings.
        train_dataset: RGB images.
        eval_dataset: RGB images; needed unless ``eval_strategy="no"``.
        callbacks: further callbacks.

    Raises:
        ValueError: the decoder belongs to another model or is not float32, or the teacher's depth is out of range.
    """

    args: DistillationConfig
    # The loss is already divided by the positions of the whole update.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        decoder: VisualDecoder,
        teacher: PreTrainedModel,
        processing_class: ProcessorMixin,
        args: DistillationConfig,
        train_dataset: Images,
        eval_dataset: Images | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.collator = ImageCollator(processing_class)
        model: Any = unwrapped(teacher)
        family = family_of(model)
        decoder.check_compatible(model)
        if decoder.own_parameter.dtype != torch.float32:
            raise ValueError(
                f"decoder must hold float32 weights to be trained, not {decoder.own_parameter.dtype}: "
                "VisualDecoder.initialized makes one, decoder.float() another."
            )
        blocks = len(family.llm_blocks(model))
        self.depth = blocks if args.teacher_depth is None else args.teacher_depth
        if not 0 <= self.depth <= blocks:
            raise ValueError(f"teacher_depth={self.depth} must lie within 0..{blocks}, the model's number of blocks.")
        if not decoder.has_token_tables:
            decoder.set_token_tables(processing_class.tokenizer)
        self.train_sampler: EpochSampler | None = None
        callbacks = [_EpochCallback(self), *(callbacks or [])]
        if args.early_stopping_patience is not None:
            callbacks.append(PatienceCallback(args.early_stopping_patience))
        super().__init__(
            model=DistillationObjective(
                decoder.requires_grad_(True), args.alpha, args.temperature, args.loss_chunk_size
            ),
            args=args,
            data_collator=self.collator,
            train_dataset=PaddedImages(train_dataset),
            eval_dataset=None if eval_dataset is None else PaddedImages(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.args._n_gpu = 1  # several processes train together, not several copies inside one process
        if getattr(model, "hf_device_map", None) is None:
            model.to(self.args.device)
        self.teacher = model.requires_grad_(False).eval()
        self.family = family
        # KL, cross-entropy, agreement and positions since the last log
        self._parts = torch.zeros(4, device=self.args.device)

    @property
    def decoder(self) -> VisualDecoder:
        """The decoder in its present state."""
        return self.accelerator.unwrap_model(self.model).decoder

    # --- data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        images: Any = self.train_dataset if train_dataset is None else train_dataset
        self.train_sampler = EpochSampler(len(images), self._train_batch_size * self.args.world_size, seed)
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return EpochSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """Take the batches of one update and count their image positions in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        token = self.family.image_token_id(self.teacher.config)
        positions = torch.tensor(sum(int((batch["input_ids"] == token).sum()) for batch in batches), device=device)
        return batches, self.accelerator.reduce(positions, "sum").clamp(min=1)

    # --- teacher and loss

    @torch.no_grad()
    def teacher_pass(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the teacher up to its depth.

        Args:
            inputs: what the collator made of at least one image.

        Returns:
            features (N, d), states (N, d) normalised if the teacher is meant to be, grids (n_blocks, 2).
        """
        features, states, grids = image_features_and_states(self.teacher, inputs, self.depth)
        return features, self.family.final_norm(self.teacher)(states) if self.args.final_norm else states, grids

    def teacher_head(self) -> TeacherHead:
        """Return the teacher's output matrix."""
        head = self.family.unembedding(self.teacher)
        return TeacherHead(head.weight.detach(), None if head.bias is None else head.bias.detach())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over this batch's positions, divided by the positions of the whole update.

        Processes average their gradients, hence the factor of their number.
        """
        if "pixel_values" in inputs:
            features, states, _ = self.teacher_pass(inputs)
        else:  # a batch of filling only: its part of the sum is 0, but all processes take part in the update
            features = states = torch.zeros(0, self.decoder.hidden_size, device=self.args.device)
        loss, parts = model(features, states, self.teacher_head())
        self._parts += torch.cat([parts, parts.new_tensor([len(features)])])
        if num_items_in_batch is None:
            loss = loss / max(1, len(features))
        else:
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the training loss since the last log to the log."""
        if "loss" in logs and "eval_loss" not in logs:
            kl, ce, agreement, positions = self.accelerator.reduce(
                self._parts.float().to(self.args.device), "sum"
            ).tolist()
            if positions:
                logs |= {"kl": kl / positions, "ce": ce / positions, "agreement": agreement / positions}
            self._parts.zero_()
        super().log(logs, start_time)

    # --- validation

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure loss and agreement with the teacher.

        Returns:
            No predictions; the loss and its parts averaged over image positions, the figures of
            ``reading_agreement`` (compared by text) averaged over images.
        """
        objective = self.accelerator.unwrap_model(self.model).eval()
        self.callback_handler.eval_dataloader = dataloader
        sums: dict[str, float] = dict.fromkeys(("loss", "kl", "ce", "positions", "images"), 0.0)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            if "pixel_values" in inputs:
                for name, value in self._validate(objective, inputs).items():
                    sums[name] = sums.get(name, 0.0) + value
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums = self._summed_over_processes(sums)
        positions, images = sums.pop("positions"), sums.pop("images")
        figures = {name: sums.pop(name) / positions for name in ("loss", "kl", "ce")}
        figures |= {name: value / images for name, value in sums.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=np.zeros(0), label_ids=None, metrics=metrics, num_samples=int(images))

    def _validate(self, objective: DistillationObjective, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums over one batch."""
        features, states, grids = self.teacher_pass(inputs)
        head, decoder = self.teacher_head(), objective.decoder
        loss, parts = objective(features, states, head)
        readings = min(STUDENT_READINGS, decoder.num_classes)
        figures = reading_agreement(
            decoder.top_k(features, readings, unembedding=head.weight),
            top_k_tokens(states, head.weight, TEACHER_READINGS, bias=head.bias)[0],
            grids,
            image_index=self.family.image_of_block(self.teacher, inputs, grids, inputs["input_ids"]),
            meaningless=decoder.meaningless,
            key=decoder.text_class,
        )
        figures["agreement"] = figures.pop("top1")
        kl, ce, _ = parts.tolist()
        sums = {"loss": float(loss), "kl": kl, "ce": ce, "positions": float(len(features))}
        return (
            sums
            | {name: float(values.sum()) for name, values in figures.items()}
            | {"images": float(len(figures["agreement"]))}
        )

    def _summed_over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return sums
        from accelerate.utils import gather_object

        gathered = gather_object([sums])
        names = dict.fromkeys(name for part in gathered for name in part)
        return {name: math.fsum(part.get(name, 0.0) for part in gathered) for name in names}

    # --- files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the decoder: float32 into a checkpoint, else in the teacher's dtype."""
        if not self.args.should_save:
            return
        decoder = self.decoder if _internal_call else self.finished_decoder()
        decoder.save_pretrained(output_dir or str(self.args.output_dir))

    def finished_decoder(self) -> VisualDecoder:
        """Return a frozen copy of the decoder in the dtype of the teacher's output matrix."""
        decoder = copy.deepcopy(self.decoder).requires_grad_(False).eval()
        return decoder.to(self.family.unembedding(self.teacher).weight.dtype)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.decoder.load_state_dict(VisualDecoder.from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class _EpochCallback(TrainerCallback):
    """Tell the sampler which epoch begins.

    Not left to the data loader: one that skips the batches of a continued epoch does not pass the number on when
    several processes share it.
    """

    def __init__(self, trainer: VisualDecoderDistillationTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.epoch = int((state.epoch or 0) + 1e-6)


class PatienceCallback(TrainerCallback):
    """Stop when the last `patience` validations brought no better figure.

    It counts in the log, which checkpoints carry, and so needs no state of its own when a run is continued.

    Args:
        patience: validations without improvement, at least 1.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        values = [row[name] for row in state.log_history if name in row]
        if not values:
            return
        best = max(values) if args.greater_is_better else min(values)
        if len(values) - 1 - values.index(best) >= self.patience:
            control.should_training_stop = True
