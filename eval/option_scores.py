"""Log-likelihoods of given answers: how probable does a model find each option as its reply to a question?

The prompt, images included, goes through the model once for all options of a row; an option of n tokens costs n - 1
columns more on the prompt's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from scipy.special import softmax

from dualstream.modeling import CompressionConfig, VisualCompressionMixin, compressing
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.prompt_session import session_of

from .arms import Arm, parse_arm
from .chat_inputs import Conversation, answer_tokens, chat_batch, chat_prompt, user_turn
from .encoded_once import reusing_image_features
from .prompt_costs import PromptTokens, prompt_tokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

Compression: TypeAlias = Arm | CompressionConfig | dict[str, Any] | str | None


@dataclass(frozen=True)
class OptionScores:
    """What a model makes of the options of one prompt.

    Attributes:
        log_likelihoods: (options,) float64, summed log p(tokens of the option | prompt) in nats.
        first_token: (options,) float64, log p of the first token alone.
        greedy: (options,) bool, whether greedy decoding would start with exactly these tokens.
        num_tokens: (options,) int64, tokens of each option.
        prompt: tokens of the prompt.
    """

    log_likelihoods: np.ndarray
    first_token: np.ndarray
    greedy: np.ndarray
    num_tokens: np.ndarray
    prompt: PromptTokens


def option_log_likelihoods(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Sequence[Image]],
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    compression: Compression = None,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """Score the options of every question.

    Args:
        model: a supported VLM, stock or ours.
        processor: its processor.
        images: per question its RGB images, possibly none; they stand before the text.
        prompts: the questions, one user turn each in the model's chat template.
        options: per question the answers to score, one or more.
        compression: None or ``"none"`` keeps every visual token; otherwise an arm (see ``arms``), a
            ``CompressionConfig`` or a dict of its options.
        batch_size: prompts per forward call.

    Returns:
        Per question (options,) float64: log p(option | prompt) in nats, summed over the option's tokens. The end of
        the turn is not part of an option.

    Raises:
        ValueError: lengths differ, a question has no option, an option is empty, or the compression is unknown.
    """
    found = option_log_likelihoods_under(model, processor, images, prompts, options, [compression], batch_size)
    return found[0]


def option_log_likelihoods_under(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Sequence[Image]],
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    compressions: Sequence[Compression],
    batch_size: int = 8,
) -> list[list[np.ndarray]]:
    """Score the options of every question under several compressions.

    Every image is prepared once for all of them, and encoded once for those that do not scale the vision tower's RoPE.

    Args:
        model: see ``option_log_likelihoods``, as for all arguments but one.
        processor: its processor.
        images: per question its images.
        prompts: the questions.
        options: per question the answers to score.
        compressions: one or more.
        batch_size: prompts per forward call.

    Returns:
        Per compression what ``option_log_likelihoods`` returns.

    Raises:
        ValueError: see there.
    """
    if not len(images) == len(prompts) == len(options):
        raise ValueError(
            f"images, prompts and options must be paired, got {len(images)}, {len(prompts)} and {len(options)}."
        )
    conversations = [user_turn(prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)]
    arms = [_arm(compression) for compression in compressions]
    found: list[list[np.ndarray]] = [[] for _ in arms]
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        batch = prepare_options(processor, conversations[part], images[part], options[part])
        batch.inputs.to(model.device)  # once, so that the pixels stay the same tensor
        features: dict[str, Any] = {}
        for arm, scores in zip(arms, found, strict=True):
            scaled = isinstance(arm, Arm) and arm.rope is not None
            encoding = nullcontext() if scaled else reusing_image_features(model, features)
            with compression_context(model, processor, arm), encoding:
                scores += [score.log_likelihoods for score in score_options(model, batch)]
    return found


def option_probabilities(log_likelihoods: np.ndarray) -> np.ndarray:
    """Normalise over the options.

    Args:
        log_likelihoods: (..., options) in nats.

    Returns:
        (..., options) float64, each at least 0, summing to 1.
    """
    return softmax(np.asarray(log_likelihoods, dtype=np.float64), axis=-1)


def compression_context(
    model: PreTrainedModel, processor: ProcessorMixin, compression: Compression
) -> AbstractContextManager[Any]:
    """Context in which the model works on compressed images, as ``compression`` of ``option_log_likelihoods`` says.

    Without compression a stock model is left exactly as it is.
    """
    arm = _arm(compression)
    off = arm.is_off if isinstance(arm, Arm) else arm.method == "none"
    if off and not isinstance(unwrapped(model), VisualCompressionMixin):
        return nullcontext(model)
    if isinstance(arm, Arm):
        return arm.applied(model, processor)
    return compressing(model, config=arm, tokenizer=processor.tokenizer)


def _arm(compression: Compression) -> Arm | CompressionConfig:
    if isinstance(compression, str):
        return parse_arm(compression)
    return compression if isinstance(compression, Arm) else CompressionConfig.from_any(compression)


@dataclass(frozen=True)
class OptionBatch:
    """Prompts and options as the model takes them.

    Attributes:
        inputs: model inputs of B prompts, left-padded.
        tokens: per row and option its token ids.
    """

    inputs: Any
    tokens: list[list[list[int]]]


def prepare_options(
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    images: Sequence[Sequence[Image]],
    options: Sequence[Sequence[str]],
) -> OptionBatch:
    """Tokenise conversations and options and prepare the images.

    Args:
        processor: a VLM processor.
        conversations: B conversations that end with a user's turn.
        images: the RGB images of each, in the order of their placeholders.
        options: the answers to score, one or more for each.

    Raises:
        ValueError: a row has no option, or an option is empty.
    """
    without = [row for row, given in enumerate(options) if not given]
    if without:
        raise ValueError(f"options of row {without[0]} are empty: give at least one answer to score.")
    prompts = [chat_prompt(processor, conversation) for conversation in conversations]
    tokens = [
        answer_tokens(processor, conversation, prompt, given)
        for conversation, prompt, given in zip(conversations, prompts, options, strict=True)
    ]
    return OptionBatch(chat_batch(processor, prompts, images), tokens)


@torch.no_grad()
def score_options(model: PreTrainedModel, batch: OptionBatch) -> list[OptionScores]:
    """Score the options of one batch, under whatever compression is switched on.

    Args:
        model: a supported VLM.
        batch: of ``prepare_options``.

    Returns:
        Scores, one per row.
    """
    prefill = _Prefill(model, batch.inputs.to(model.device))
    columns = [
        prefill.score([row[number] if number < len(row) else [] for row in batch.tokens])
        for number in range(max(map(len, batch.tokens), default=0))
    ]
    scores = []
    for row, (given, prompt) in enumerate(zip(batch.tokens, prefill.prompt_tokens(), strict=True)):
        total, first, greedy, length = zip(*(column[row] for column in columns[: len(given)]), strict=True)
        scores.append(OptionScores(np.array(total), np.array(first), np.array(greedy), np.array(length), prompt))
    return scores


class _Prefill:
    """A batch of prompts that went through the model once, and continuations scored on its cache."""

    def __init__(self, model: Any, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        inner: Any = unwrapped(model)
        positions = inner._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        output = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.next_token = output.logits[:, -1].float().log_softmax(-1)  # (B, V)
        session = session_of(self.cache)  # describes the prompt if it was compressed
        self.mask = inputs["attention_mask"] if session is None else session.attention_mask
        self.positions = positions if session is None else session.position_ids
        self.report = None if session is None else inner.last_compression

    def prompt_tokens(self) -> list[PromptTokens]:
        """Tokens of every prompt."""
        return prompt_tokens(self.model, self.inputs, self.report)

    def score(self, tokens: list[list[int]]) -> list[tuple[float, float, bool, int]]:
        """Score one continuation per row.

        Args:
            tokens: B lists of ids; a row with an empty one is skipped.

        Returns:
            Per row: summed log-likelihood, that of the first token, whether it is the greedy continuation, its length.
        """
        log_p = [self.next_token[:, None]]
        longest = max(map(len, tokens)) - 1
        if longest > 0:
            log_p.append(self._continued(tokens, longest))
        every = torch.cat(log_p, dim=1)  # (B, longest + 1, V), aligned with the tokens
        return [_score_row(every[row, : len(ids)], ids) for row, ids in enumerate(tokens)]

    def _continued(self, tokens: list[list[int]], width: int) -> torch.Tensor:
        """Log-probabilities (B, width, V) float32 behind the first ``width`` tokens of every row, right-padded."""
        device = self.mask.device
        ids = torch.zeros(len(tokens), width, dtype=torch.long)
        tail = torch.zeros_like(ids)
        for row, given in enumerate(tokens):
            shown = given[:-1]
            ids[row, : len(shown)], tail[row, : len(shown)] = torch.tensor(shown, dtype=torch.long), 1
        ids, tail = ids.to(device), tail.to(self.mask)
        output = self.model(
            input_ids=ids,
            attention_mask=torch.cat([self.mask, tail], dim=1),
            position_ids=self.positions[..., -1:] + tail.cumsum(-1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.crop(-width)
        return output.logits.float().log_softmax(-1)


def _score_row(log_p: torch.Tensor, tokens: list[int]) -> tuple[float, float, bool, int]:
    if not tokens:
        return 0.0, 0.0, False, 0
    ids = torch.tensor(tokens, device=log_p.device)
    chosen = log_p.gather(-1, ids[:, None])[:, 0].double()
    return float(chosen.sum()), float(chosen[0]), bool((log_p.argmax(-1) == ids).all()), len(tokens)
