"""Conversations as model inputs: any number of images per row, text-only rows, and answers as tokens.

The words and special tokens are those of the checkpoint's own chat template, as ``processor.apply_chat_template`` and
``generate`` would see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, ProcessorMixin

Conversation = list[dict[str, Any]]


def user_turn(text: str, images: int = 0) -> Conversation:
    """Return a conversation of one question: the images first, then the text, unchanged."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def chat_prompt(processor: ProcessorMixin, conversation: Conversation) -> str:
    """Return the text of a conversation up to where the assistant's answer starts.

    Raises:
        ValueError: the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ValueError("processor has no chat template: use an instruction-tuned checkpoint, or set one.")
    messages: Any = conversation
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def chat_batch(processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Sequence[Image]]) -> BatchFeature:
    """Turn prompts into a left-padded batch.

    Args:
        processor: a VLM processor.
        prompts: B texts of ``chat_prompt``.
        images: for each of them its RGB images, in the order of the placeholders; may be empty.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, L) int64, and where there are images ``pixel_values`` and what else
        the family needs. A compression choice stored in the processor is left out.

    Raises:
        ValueError: prompts and images do not pair up.
    """
    if len(prompts) != len(images):
        raise ValueError(f"prompts and images must be paired: {len(prompts)} prompts, {len(images)} lists of images.")
    flat = [image for row in images for image in row]
    inputs = processor(
        text=list(prompts),
        images=flat or None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=_lacks_start(processor, prompts),
    )
    inputs.pop("compression", None)
    return inputs


def answer_tokens(
    processor: ProcessorMixin, conversation: Conversation, prompt: str, answers: Sequence[str]
) -> list[list[int]]:
    """Return the tokens that the model would write to give each of several answers, without the end of its turn.

    What stands between prompt and answer is what the chat template puts there in a finished conversation: a blank
    after LLaVA's "ASSISTANT:", nothing after Qwen's "assistant" line. An answer is tokenised behind the prompt; where
    that would merge it with the prompt's last token, which generation cannot, it is tokenised alone.

    Args:
        processor: a VLM processor.
        conversation: the turns before the answer.
        prompt: their ``chat_prompt``.
        answers: the words of each; a leading blank is taken as it is.

    Returns:
        Token ids of each, at least one.

    Raises:
        ValueError: an answer is empty.
    """
    empty = [answer for answer in answers if not answer.strip()]
    if empty:
        raise ValueError(f"option {empty[0]!r} is empty: an answer to score needs at least one visible character.")
    texts = [a if a[0].isspace() else _seam(processor, conversation, prompt, a) + a for a in answers]
    encode = processor.tokenizer
    special = _lacks_start(processor, [prompt])
    before, *whole = encode([prompt, *(prompt + text for text in texts)], add_special_tokens=special).input_ids
    swallows = bool(before) and before[-1] == encode.unk_token_id  # an unknown word takes in what is glued to it
    return [
        ids[len(before) :]
        if ids[: len(before)] == before and not swallows
        else list(encode(text, add_special_tokens=False).input_ids)
        for ids, text in zip(whole, texts, strict=True)
    ]


def _seam(processor: ProcessorMixin, conversation: Conversation, prompt: str, answer: str) -> str:
    """The blanks that the template writes between the prompt and an answer, "" if it rewrites the prompt."""
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    messages: Any = [*conversation, reply]
    finished = str(processor.apply_chat_template(messages, tokenize=False))
    found, _, _ = finished.removeprefix(prompt).partition(answer)
    return found if finished.startswith(prompt) and found.isspace() else ""


def _lacks_start(processor: ProcessorMixin, prompts: Sequence[str]) -> bool:
    """Whether the tokenizer must add its special tokens, because the template has not written the first one."""
    start = getattr(processor.tokenizer, "bos_token", None)
    return start is None or not any(prompt.startswith(start) for prompt in prompts)
