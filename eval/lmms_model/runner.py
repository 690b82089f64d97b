"""A loaded model that answers batches under a chosen arm and says what each answer cost. Knows no harness."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dualstream.eval.arms import Arm, parse_arm
from dualstream.eval.chat_inputs import Conversation, chat_batch, chat_prompt
from dualstream.eval.option_scores import OptionScores, compression_context, prepare_options, score_options
from dualstream.eval.prompt_costs import PromptTokens, kv_bytes_per_token, prompt_tokens
from dualstream.modeling import CompressionConfig, VisualDecoder, load_model
from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.processing import register_processors

from .arguments import UNEMBEDDING, ModelArguments
from .generation import GenerationSettings

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Cost:
    """What one answer cost.

    Attributes:
        prompt: tokens of the prompt.
        new_tokens: tokens written, the end token included; tokens scored, for options.
        kv_bytes: bytes of keys and values of this row's prompt and new tokens, without padding.
        seconds: wall time of the model's calls for the batch, divided by its rows; preparing images is not in it.
        batch_size: rows of the batch.
    """

    prompt: PromptTokens
    new_tokens: int
    kv_bytes: int
    seconds: float
    batch_size: int


class ModelRunner:
    """A model, its processor, and the arm that its visual tokens pass.

    Args:
        model: a supported VLM, stock or ours.
        processor: its processor.
        decoder: reads the pictures for compressions; None: the model's own.
        arm: see ``use_arm``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        decoder: VisualDecoder | None = None,
        arm: Arm | str | None = None,
    ) -> None:
        self.model, self.processor, self.decoder = model, processor, decoder
        self.use_arm(arm)

    @classmethod
    def load(cls, arguments: ModelArguments, device: Any = None) -> ModelRunner:
        """Load what the arguments name.

        Args:
            arguments: of the harness.
            device: where to, unless the arguments spread the model over several.

        Raises:
            ValueError: model, decoder or adapter do not load or do not fit.
        """
        register_processors()
        options: dict[str, Any] = {"device_map": arguments.device_map} if arguments.is_spread else {"device": device}
        for name in ("revision", "attn_implementation"):
            if getattr(arguments, name) is not None:
                options[name] = getattr(arguments, name)
        if arguments.trust_remote_code:
            options["trust_remote_code"] = True
        model, processor = load_model(
            arguments.pretrained, dtype=arguments.dtype, vision_rope_scaling=arguments.rope_scaling, **options
        )
        if arguments.peft is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, arguments.peft).merge_and_unload()
        return cls(model, processor, _decoder(model, arguments.decoder), arguments.compression)

    def use_arm(self, arm: Arm | str | None) -> None:
        """Choose what happens to the visual tokens from now on.

        Args:
            arm: an arm or its text; None: what the checkpoint does by itself.
        """
        if arm is None:
            arm = Arm(CHECKPOINT, self._own_choice())
        self.arm = parse_arm(arm) if isinstance(arm, str) else arm

    def _own_choice(self) -> CompressionConfig:
        choice = getattr(self.processor, "compression", None)
        if choice is None:
            choice = getattr(unwrapped(self.model), "compression_config", None)
        return CompressionConfig.from_any(choice)

    def _armed(self) -> AbstractContextManager[Any]:
        if self.arm.is_off:  # a stock model is left exactly as it is
            return compression_context(self.model, self.processor, self.arm)
        return self.arm.applied(self.model, self.processor, self.decoder)

    @torch.no_grad()
    def generate(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[Image]],
        settings: GenerationSettings,
    ) -> list[tuple[str, Cost]]:
        """Answer a batch.

        Args:
            conversations: B conversations that end with a user's turn.
            images: RGB images of each, in the order of their placeholders; may be empty.
            settings: how to write.

        Returns:
            B answers without special tokens, and their costs.
        """
        prompts = [chat_prompt(self.processor, conversation) for conversation in conversations]
        inputs = chat_batch(self.processor, prompts, images).to(self.model.device)
        with self._armed():
            start = self._now()
            output = self.model.generate(**inputs, **dict(settings.options))
            seconds = self._now() - start
            report = getattr(unwrapped(self.model), "last_compression", None)
        tokens = prompt_tokens(self.model, inputs, report)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        lengths = [self._written(row) for row in new]
        return [
            (settings.cut(text), self._cost(prompt, length, seconds, len(prompts)))
            for text, prompt, length in zip(texts, tokens, lengths, strict=True)
        ]

    @torch.no_grad()
    def score(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[Image]],
        options: Sequence[Sequence[str]],
    ) -> list[tuple[OptionScores, Cost]]:
        """Score the options of a batch; see ``option_scores.score_options``."""
        batch = prepare_options(self.processor, conversations, images, options)
        with self._armed():
            start = self._now()
            scores = score_options(self.model, batch)
            seconds = self._now() - start
        return [
            (score, self._cost(score.prompt, int(score.num_tokens.sum()), seconds, len(scores))) for score in scores
        ]

    def _cost(self, prompt: PromptTokens, new_tokens: int, seconds: float, rows: int) -> Cost:
        kv_bytes = kv_bytes_per_token(self.model) * (prompt.total + new_tokens)
        return Cost(prompt, new_tokens, kv_bytes, seconds / rows, rows)

    def _written(self, row: list[int]) -> int:
        """Tokens up to the first end token, that one included."""
        end = self.model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return next((place for place, token in enumerate(row, start=1) if token in ends), len(row))

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _decoder(model: Any, name: str | None) -> VisualDecoder | None:
    if name is None:
        return None
    if name == UNEMBEDDING:
        return VisualDecoder.from_unembedding(family_of(model).unembedding(model).weight)
    decoder = VisualDecoder.from_pretrained(name).to(model.device)
    decoder.check_compatible(model)
    return decoder
