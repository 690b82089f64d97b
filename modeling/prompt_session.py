"""Keep original and compressed coordinates in step around a ``generate`` call: streamers, outputs, later turns."""

from dataclasses import dataclass
from typing import Any

import torch

CACHE_ATTRIBUTE = "_visual_prompt_session"


class PromptRestoringStreamer:
    """Show a streamer the original prompt; everything after the first ``put`` passes through."""

    def __init__(self, streamer: Any, prompt: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = prompt

    def put(self, value: torch.Tensor) -> None:
        """Forward new tokens, or the original prompt in place of the compressed one."""
        if self._prompt is not None:
            copies = value.shape[0] // self._prompt.shape[0]
            value, self._prompt = self._prompt.repeat_interleave(copies, dim=0), None
        self._streamer.put(value)

    def end(self) -> None:
        """Forward the end of the stream."""
        self._streamer.end()


@dataclass
class PromptSession:
    """A compressed prompt whose keys and values live in a cache.

    Attributes:
        original_ids: (B, L) long, the prompt as the caller knows it.
        ids: (B, L2) long, the prompt as the model saw it.
        attention_mask: (B, L2) long.
        position_ids: (B, L2), (3, B, L2) or (4, B, L2) long.
        reusable: whether rows of the cache still match rows of the prompt (not after beam search).
    """

    original_ids: torch.Tensor
    ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    reusable: bool = True

    @property
    def removed(self) -> int:
        """Columns saved, L - L2."""
        return self.original_ids.shape[1] - self.ids.shape[1]

    def repeated(self, times: int, reusable: bool) -> "PromptSession":
        """Return the session of a cache in which every row was repeated."""
        return PromptSession(
            self.original_ids.repeat_interleave(times, dim=0),
            self.ids.repeat_interleave(times, dim=0),
            self.attention_mask.repeat_interleave(times, dim=0),
            self.position_ids.repeat_interleave(times, dim=self.position_ids.ndim - 2),
            reusable,
        )

    def attach(self, cache: Any) -> None:
        """Remember this session on a cache object."""
        if cache is not None:
            setattr(cache, CACHE_ATTRIBUTE, self)

    def continued(self, tail_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extend mask and positions by the tokens after the prompt.

        Args:
            tail_mask: (B, T) mask of every token after the prompt, cached or new.

        Returns:
            Mask (B, L2 + T) and positions (..., B, L2 + T).
        """
        tail_mask = tail_mask.to(self.attention_mask)
        tail = self.position_ids[..., -1:] + tail_mask.cumsum(-1)
        return torch.cat([self.attention_mask, tail_mask], -1), torch.cat([self.position_ids, tail], -1)

    def next_turn(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int
    ) -> tuple[dict[str, Any], bool]:
        """Translate the inputs of a later ``generate`` call on the same cache.

        Args:
            input_ids: (B, T) the whole conversation so far, or only its new tokens.
            attention_mask: (B, T') of the whole conversation in original coordinates; needed with new tokens only.
            past_length: tokens in the cache.

        Returns:
            New ``input_ids``, ``attention_mask`` and ``position_ids``, and whether `input_ids` was the whole
            conversation.

        Raises:
            ValueError: if rows, prompt or lengths do not match the cache.
        """
        length = self.original_ids.shape[1]
        if not self.reusable or input_ids.shape[0] != self.original_ids.shape[0]:
            raise ValueError(
                f"this cache holds {self.original_ids.shape[0]} rows"
                f"{'' if self.reusable else ' reordered by beam search'} but input_ids has {input_ids.shape[0]}; "
                "continue a compressed prompt with the same rows, from greedy search or sampling, or start a new cache"
            )
        if past_length < self.ids.shape[1]:
            raise ValueError(
                f"the cache was cropped to {past_length} tokens, into its compressed prompt of {self.ids.shape[1]}; "
                "start a new cache"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        whole = attention_mask.shape[1] == input_ids.shape[1]
        if attention_mask.shape[1] <= length or (whole and not self._is_prefix_of(input_ids)):
            raise ValueError(
                f"the cache holds a compressed prompt of originally {length} tokens, but input_ids "
                f"{tuple(input_ids.shape)} with attention_mask {tuple(attention_mask.shape)} does not continue it; "
                "pass the returned sequences followed by the new tokens, or the new tokens with the mask of the whole "
                "conversation"
            )
        mask, positions = self.continued(attention_mask[:, length:])
        ids = torch.cat([self.ids, input_ids[:, length:]], dim=-1) if whole else input_ids
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, whole

    def next_forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int
    ) -> dict[str, torch.Tensor]:
        """Translate a hand-written decoding step: new tokens on the cache, without position ids.

        Args:
            input_ids: (B, T) new tokens.
            attention_mask: None, or a mask of everything in original or in compressed coordinates.
            past_length: tokens in the cache.

        Returns:
            New ``attention_mask`` and ``position_ids`` (..., B, T).

        Raises:
            ValueError: if the mask fits neither.
        """
        tail_length = past_length - self.ids.shape[1] + input_ids.shape[1]
        if attention_mask is None:
            tail_mask = torch.ones_like(input_ids[:, :1]).expand(-1, tail_length)
        elif attention_mask.shape[1] in (self.original_ids.shape[1] + tail_length, self.ids.shape[1] + tail_length):
            tail_mask = attention_mask[:, attention_mask.shape[1] - tail_length :]
        else:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns; expected {self.original_ids.shape[1]} of the "
                f"prompt (or {self.ids.shape[1]} of the compressed prompt) plus {tail_length}"
            )
        mask, positions = self.continued(tail_mask)
        return {"attention_mask": mask, "position_ids": positions[..., -input_ids.shape[1] :]}

    def _is_prefix_of(self, input_ids: torch.Tensor) -> bool:
        return torch.equal(input_ids[:, : self.original_ids.shape[1]], self.original_ids)


def session_of(cache: Any) -> PromptSession | None:
    """Return the session of a cache that holds a compressed prompt, None for any other or an emptied one."""
    session = getattr(cache, CACHE_ATTRIBUTE, None)
    return session if session is not None and int(cache.get_seq_length()) > 0 else None


def restore_prompt(output: Any, prompt: torch.Tensor, compressed_length: int) -> Any:
    """Put the original prompt before the new tokens of a ``generate`` result.

    Args:
        output: (B * n, L2 + new) tensor, or a ``ModelOutput`` with ``sequences``.
        prompt: (B, L) long.
        compressed_length: L2.

    Returns:
        The same kind of object with (B * n, L + new) sequences. Scores, attentions and hidden states stay in the
        coordinates of the compressed prompt.
    """
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    copies = sequences.shape[0] // prompt.shape[0]
    prompt = prompt.to(sequences.device).repeat_interleave(copies, dim=0)
    restored = torch.cat([prompt, sequences[:, compressed_length:]], dim=-1)
    if isinstance(output, torch.Tensor):
        return restored
    output.sequences = restored
    return output
