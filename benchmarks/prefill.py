"""The ways to the first token that everything is measured against: all visual tokens, fewer of them, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dualstream.modeling import VisualDecoder, compressing
from dualstream.modeling.compression_report import feature_output
from dualstream.modeling.families import family_of, flatten_features
from dualstream.modeling.prompt_plan import plan_prompt

from .forced_map import forced, kept_cells
from .workload import Inputs, image_inputs_of

FULL, LIMIT, OURS = "uncompressed", "native short", "compressed"


@dataclass
class Prefill:
    """A prompt that went through the model.

    Attributes:
        first_token: (B,) long, the most likely next token.
        cache: keys and values of the prompt.
        length: columns of the prompt that reached the language model.
    """

    first_token: torch.Tensor
    cache: Any
    length: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, padding included."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


Way = Callable[[], Prefill]


@torch.no_grad()
def feature_grids(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return (n_blocks, 2) long on the CPU: height and width of every feature block; encodes the pictures."""
    pictures = image_inputs_of(model, inputs)
    found: Any = model
    output = found.model.get_image_features(**pictures, return_dict=True)
    return family_of(model).feature_blocks(model, pictures, output.pooler_output)


def uncompressed(model: nn.Module, inputs: Inputs) -> Way:
    """Way of the stock model, with every visual token."""
    return lambda: first_token(model, inputs)


def compressed(
    model: nn.Module, inputs: Inputs, reduction: float, decoder: VisualDecoder, grids: torch.Tensor | None = None
) -> Way:
    """Way of run-length compression at a forced reduction rate, entering and leaving the block included.

    Args:
        model: a stock model.
        inputs: of the whole prompt.
        reduction: share of visual tokens that are removed, see ``forced_map.kept_cells``.
        decoder: reads the features.
        grids: what ``feature_grids`` returns, if known.
    """
    grids = feature_grids(model, inputs) if grids is None else grids
    return reading_with(model, inputs, forced(decoder, grids, reduction))


def reading_with(model: nn.Module, inputs: Inputs, reader: VisualDecoder) -> Way:
    """Way of run-length compression with what a decoder reads."""

    def way() -> Prefill:
        with compressing(model, "rle", decoder=reader):
            return first_token(model, inputs)

    return way


@torch.no_grad()
def native_short(model: nn.Module, inputs: Inputs, reduction: float, grids: torch.Tensor | None = None) -> Way:
    """Way of the stock model when it is given the shorter prompt in the first place: the limit of any compression.

    The pictures are encoded as always and the first features of each are taken; ids, mask and, for M-RoPE models,
    positions of the short prompt are ready beforehand, so nothing is read, planned or rewritten.

    Args:
        model: a stock model.
        inputs: of the whole prompt.
        reduction: as for ``compressed``; the prompts of both have the same length.
        grids: what ``feature_grids`` returns, if known.
    """
    grids = feature_grids(model, inputs) if grids is None else grids
    short, encoded = shortened(model, inputs, grids, kept_cells(grids, reduction))

    def way() -> Prefill:
        return first_token(model, {**short, "mm_encoder_outputs": {"image": encoded()}})

    return way


def shortened(
    model: nn.Module, inputs: Inputs, grids: torch.Tensor, kept: torch.Tensor
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Shorten a prompt to the first cells of every feature block.

    Args:
        model: a stock model.
        inputs: of the whole prompt.
        grids: (n_blocks, 2) long, what ``feature_grids`` returns.
        kept: (n_blocks,) long, cells of every block that stay.

    Returns:
        The inputs of the short prompt without pictures, and a function that encodes the pictures and returns the
        features that stay, in the form that ``mm_encoder_outputs`` takes.
    """
    found: Any = model
    family, device = family_of(model), inputs["input_ids"].device
    sizes, kept_sizes = grids.prod(-1), kept.tolist()
    starts = sizes.cumsum(0) - sizes
    anchor = torch.cat([start + torch.arange(number) for start, number in zip(starts, kept_sizes, strict=True)])
    anchor, cells = anchor.to(device), int(sizes.sum())
    mask, token = inputs["attention_mask"], family.image_token_id(found.config)
    plan = plan_prompt(inputs["input_ids"], mask, token, anchor, cells, "left")
    short: dict[str, Any] = plan.shorten(inputs, pad_token_id=0)
    if family.has_mrope:
        short["position_ids"] = plan.positions(torch.zeros(3, *mask.shape, dtype=torch.long, device=device), "compact")
    pictures = image_inputs_of(model, inputs)

    def take(value: Any) -> Any:
        rows = flatten_features(value)[anchor]
        return rows[None] if isinstance(value, torch.Tensor) else list(rows.split(kept_sizes))

    @torch.no_grad()
    def encoded() -> Any:
        return feature_output(found.model.get_image_features(**pictures, return_dict=True), take)

    return short, encoded


@torch.no_grad()
def first_token(model: Any, inputs: dict[str, Any]) -> Prefill:
    """Run a prompt through a model, keeping its cache, and take the most likely next token."""
    output = model(**inputs, logits_to_keep=1, use_cache=True)
    cache = output.past_key_values
    return Prefill(output.logits[:, -1].argmax(-1), cache, int(cache.get_seq_length()))
