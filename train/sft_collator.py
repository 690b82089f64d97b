"""Conversations with pictures to model inputs whose labels are the answers and nothing else.

The tokens up to an answer are exactly those that the model is given when it has to answer, and the answer's tokens are
those it would have to generate, its end token included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
TYPE_INPUTS = ("mm_token_type_ids", "token_type_ids")  # inputs that run along the prompt and are 0 for text


@dataclass(frozen=True)
class Turn:
    """One exchange as text.

    Attributes:
        before: everything up to the answer that no earlier turn holds, template included.
        answer: the answer with what the template puts after it.
        start: the conversation's text up to the answer.
    """

    before: str
    answer: str
    start: str


class AnswerCollator:
    """Turn rows with `messages` and `images` into a left-padded batch.

    Args:
        processor: a VLM processor with a chat template.
        end_tokens: ids that end an answer; the tokenizer's own is added to an answer that the template does not end.
        image_token_id: id of the image placeholder in the prompt.
        max_length: longest row in tokens, None for any.

    Raises:
        ValueError: the processor has no chat template, or there is no end token.
    """

    def __init__(
        self, processor: Any, end_tokens: Iterable[int], image_token_id: int, max_length: int | None = None
    ) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ValueError("processor has no chat template: use an instruction-tuned checkpoint, or set one.")
        self.processor, self.tokenizer = processor, processor.tokenizer
        own = self.tokenizer.eos_token_id
        self.end_tokens = {int(token) for token in end_tokens} | ({own} if own is not None else set())
        if not self.end_tokens:
            raise ValueError("neither the tokenizer nor the generation config has an end token: answers need one.")
        self.appended_end = own if own is not None else min(self.end_tokens)
        self.image_token_id, self.max_length = image_token_id, max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows: each with ``messages``, whose contents are texts or lists of parts, and ``images``. All pictures come
                before the first answer.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (B, L) int64, the pictures' inputs and the token types.
            Labels are -100 except on the answers' tokens.

        Raises:
            ValueError: a row has no picture or no answer, its placeholders do not fit its pictures, its template
                rewrites earlier turns, or it is longer than allowed.
        """
        images = [[image.convert("RGB") for image in row["images"] or ()] for row in rows]
        turns = [self._turns(row["messages"], len(own)) for row, own in zip(rows, images, strict=True)]
        encoded = self.processor(
            text=[row[0].before for row in turns],
            images=images,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        encoded.pop("compression", None)  # the trainer decides how prompts are compressed, not the processor
        ids, mask = encoded.pop("input_ids"), encoded.pop("attention_mask").bool()
        sequences, labels = [], []
        for row, own_ids, own_mask in zip(turns, ids, mask, strict=True):
            sequence, label = self._sequence(row, own_ids[own_mask].tolist())
            self._check_length(sequence)
            sequences.append(sequence)
            labels.append(label)
        batch = {
            "input_ids": _pad_left(sequences, self._pad_token),
            "attention_mask": _pad_left([[1] * len(sequence) for sequence in sequences], 0),
            "labels": _pad_left(labels, IGNORED),
        }
        for name in TYPE_INPUTS:
            if name in encoded:
                own = [values[own_mask].tolist() for values, own_mask in zip(encoded.pop(name), mask, strict=True)]
                filled = [o + [0] * (len(s) - len(o)) for o, s in zip(own, sequences, strict=True)]
                batch[name] = _pad_left(filled, 0)
        return {**batch, **encoded}

    @property
    def _pad_token(self) -> int:
        token = self.tokenizer.pad_token_id
        return self.appended_end if token is None else token

    def _turns(self, messages: list[dict[str, Any]], n_images: int) -> list[Turn]:
        """Cut a conversation at its answers."""
        messages = with_placeholders(messages, n_images)
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or answers[-1] != len(messages) - 1:
            raise ValueError(
                f"messages must end with the assistant's answer; roles here: {[m['role'] for m in messages]}."
            )
        turns, done = [], ""
        for k in answers:
            if not any(part.get("text", "").strip() for part in messages[k]["content"]):
                raise ValueError("an answer in 'messages' is empty.")
            start = self.processor.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True)
            end = self.processor.apply_chat_template(messages[: k + 1], tokenize=False)
            if not (start.startswith(done) and end.startswith(start)):
                raise ValueError(
                    "the chat template writes a conversation differently once it goes on, so that an answer cannot be "
                    f"told from its prompt: {end!r} does not start with {start!r}."
                )
            turns.append(Turn(start[len(done) :], end[len(start) :], start))
            done = end
        found = [turn.before.count(self.processor.image_token) for turn in turns]
        if found != [n_images] + [0] * (len(turns) - 1):
            raise ValueError(
                f"a row with {n_images} image(s) has {found} image placeholders {self.processor.image_token!r} before "
                "its answers; all pictures must come before the first answer, and no text may spell a placeholder."
            )
        return turns

    def _sequence(self, turns: list[Turn], prompt: list[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of one row, given the ids of its first prompt with the pictures' placeholders."""
        sequence, labels = list(prompt), [IGNORED] * len(prompt)
        for number, turn in enumerate(turns):
            if number:
                following = self._encode(turn.before, special=False)
                sequence += following
                labels += [IGNORED] * len(following)
            answer, counted = self._answer(turn)
            sequence += answer
            labels += answer[:counted] + [IGNORED] * (len(answer) - counted)
        if sum(token == self.image_token_id for token in sequence) != sum(t == self.image_token_id for t in prompt):
            raise ValueError(f"an answer spells the image placeholder {self.processor.image_token!r}.")
        return sequence, labels

    def _answer(self, turn: Turn) -> tuple[list[int], int]:
        """Ids of an answer, and how many of them are to be learnt: up to and including the end token."""
        ids = self._encode_after(turn.start, turn.answer)
        for position, token in enumerate(ids):
            if token in self.end_tokens:
                return ids, position + 1
        ids = self._encode_after(turn.start, turn.answer.rstrip())
        return [*ids, self.appended_end], len(ids) + 1

    def _encode_after(self, start: str, text: str) -> list[int]:
        """Ids of a text that follows another; a token across the border could not be generated, so it is cut there."""
        first, both = self._encode(start), self._encode(start + text)
        return both[len(first) :] if both[: len(first)] == first else self._encode(text, special=False)

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _check_length(self, sequence: list[int]) -> None:
        if self.max_length is None or len(sequence) <= self.max_length:
            return
        visual = sum(token == self.image_token_id for token in sequence[self.max_length :])
        lost = f"{visual} image token(s)" if visual else "the end of the answer"
        raise ValueError(
            f"a row has {len(sequence)} tokens, max_length={self.max_length} would cut {lost}. Raise max_length, or "
            "lower max_pixels so that pictures take fewer tokens."
        )


def with_placeholders(messages: list[dict[str, Any]], n_images: int) -> list[dict[str, Any]]:
    """Write contents as lists of parts; where no part is a picture, all pictures go before the first user's text.

    Raises:
        ValueError: there is no picture, or there are more or fewer placeholders than pictures.
    """
    if n_images < 1:
        raise ValueError("a row has no picture in 'images'.")
    plain = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
    found = sum(part["type"] == "image" for message in plain for part in message["content"])
    first = next((message for message in plain if message["role"] == "user"), None)
    if found == 0 and first is not None:
        first["content"] = [{"type": "image"}] * n_images + first["content"]
    elif found != n_images:
        raise ValueError(f"a row has {found} image part(s) in 'messages' but {n_images} picture(s) in 'images'.")
    return plain


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in content
    ]


def _pad_left(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[fill] * (longest - len(row)) + row for row in rows])
