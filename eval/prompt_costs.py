"""What a prompt costs: its tokens before and after compression, and the bytes of keys and values they occupy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped

if TYPE_CHECKING:
    from dualstream.modeling import CompressionReport


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of one prompt, padding not counted.

    Attributes:
        visual: image tokens before compression.
        kept: image tokens that reached the language model.
        total: all tokens that reached the language model.
    """

    visual: int
    kept: int
    total: int


def prompt_tokens(model: Any, inputs: Any, report: CompressionReport | None) -> list[PromptTokens]:
    """Count the tokens of a batch.

    Args:
        model: a supported VLM.
        inputs: its ``input_ids`` and ``attention_mask``, (B, L) int64.
        report: what a compression did to them, None without one.

    Returns:
        One count per row.
    """
    inner: Any = unwrapped(model)
    visual = (inputs["input_ids"] == family_of(inner).image_token_id(inner.config)).sum(1).tolist()
    total = inputs["attention_mask"].sum(1).tolist()
    removed = [0] * len(visual)
    for image in report.images if report is not None else []:
        removed[image.row] += image.visual_tokens - image.kept_tokens
    return [PromptTokens(v, v - r, t - r) for v, r, t in zip(visual, removed, total, strict=True)]


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values of one token in an unquantised cache: 2 x layers x heads x head width x itemsize."""
    config: Any = unwrapped(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
