"""Read pictures at all depths: one vision pass per batch, one prefix of the language model per vision depth.

The prompt behind an image does not change what is read at its tokens (attention is causal), so a fixed one is used and
cut after the last image. Memory does not grow with the number of depths: each is read while the pass is there, and
only ids and probabilities are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dualstream.modeling.families import family_of
from dualstream.modeling.lens import unwrapped
from dualstream.modeling.vision_depths import (
    native_vision_depth,
    scaled_features,
    visit_llm_depths,
    visit_vision_depths,
)
from dualstream.processing import build_inputs, decode_pieces, token_geometry
from dualstream.processing.inference import READING_PROMPT

from .depth_maps import DECODER, NORMED, DepthMaps, Step
from .scoring import Lenses, Scored

if TYPE_CHECKING:
    from PIL.Image import Image


def make_steps(
    model: Any,
    vision_depths: Iterable[int] | None = None,
    llm_depths: Iterable[int | None] | None = None,
    lens: str = NORMED,
    norm_matched: bool = False,
) -> tuple[Step, ...]:
    """All combinations of vision and language-model depths.

    Args:
        model: the model.
        vision_depths: None: every one, 0..L_V.
        llm_depths: None: the connector's output and every depth, 0..L.
        lens: of the language model's depths.
        norm_matched: see ``Step``.
    """
    family, model = family_of(model), unwrapped(model)
    vision = range(len(family.vision_blocks(model)) + 1) if vision_depths is None else vision_depths
    inside = [None, *range(len(family.llm_blocks(model)) + 1)] if llm_depths is None else list(llm_depths)
    return tuple(Step(j, k, DECODER if k is None else lens, norm_matched) for j in vision for k in inside)


def read_depth_maps(
    model: Any,
    processor: Any,
    image: Image,
    vision_depths: Iterable[int] | None = None,
    llm_depths: Iterable[int | None] | None = None,
    top_k: int = 5,
    *,
    words: Mapping[str, Sequence[int]] | None = None,
    name: str = "image",
) -> DepthMaps:
    """Read one picture at all combinations of depths.

    Args:
        model: a supported model.
        processor: its processor.
        image: RGB picture.
        vision_depths: see ``make_steps``.
        llm_depths: see ``make_steps``.
        top_k: readings per token.
        words: words whose exact probability is wanted in every cell, with their ids (``labels.word_ids``).
        name: of the picture.
    """
    lenses = Lenses(unwrapped(model), top_k, words)
    steps = make_steps(model, vision_depths, llm_depths)
    return read_batch(lenses, processor, [image], steps, names=[name])[0]


def read_batch(
    lenses: Lenses,
    processor: Any,
    images: Sequence[Image],
    steps: Sequence[Step],
    names: Sequence[str],
    factors: Mapping[int, float] | None = None,
    prompt: str = READING_PROMPT,
) -> list[DepthMaps]:
    """Read a batch of pictures, of any sizes, in one vision pass.

    Args:
        lenses: model and what is read.
        processor: its processor.
        images: RGB pictures.
        steps: how to read them; each once.
        names: of the pictures.
        factors: vision depth -> factor of norm-matched steps (``norm_matching.norm_factors``).
        prompt: text behind each image; it changes nothing.

    Raises:
        ValueError: a step is out of range, given twice, or lacks its factor.
    """
    steps = sorted(steps, key=lambda step: step.sort_key)
    if len(set(steps)) != len(steps):
        raise ValueError("steps must differ from each other.")
    inputs = build_inputs(processor, list(images), [prompt] * len(images))
    inputs.pop("compression", None)
    inputs = inputs.to(lenses.model.device)
    scored: dict[Step, Scored] = {}
    grids, image_index = visit_steps(
        lenses.model, inputs, steps, lambda step, states: scored.setdefault(step, lenses.read(states, step)), factors
    )
    geometries = [token_geometry(processor, image.size) for image in images]
    sizes = [int(grids[image_index == number].prod(-1).sum()) for number in range(len(images))]
    _check_sizes(sizes, [len(geometry) for geometry in geometries], names)
    ids, log_probs, tracked = (
        torch.stack([getattr(scored[step], part) for step in steps]).split(sizes, dim=1)
        for part in ("ids", "log_probs", "tracked")
    )
    pieces = decode_pieces(processor.tokenizer, torch.cat(ids, dim=1).unique().numpy())
    native = native_vision_depth(lenses.model)
    return [
        DepthMaps(
            names[number],
            geometries[number],
            tuple(steps),
            native,
            ids[number].numpy(),
            log_probs[number].numpy(),
            pieces,
            lenses.words,
            tracked[number].numpy() if lenses.words else None,
        )
        for number in range(len(images))
    ]


def visit_steps(
    model: Any, inputs: Any, steps: Sequence[Step], visit: Any, factors: Mapping[int, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hand the states of every step to ``visit(step, states)``, (N, d) before any norm.

    Steps that differ in the lens alone share one pass. Returns and raises as ``visit_vision_depths``.
    """
    missing = {step.vision_depth for step in steps if step.norm_matched} - set(factors or {})
    if missing:
        raise ValueError(f"factors lack the vision depths {sorted(missing)} of norm-matched steps.")

    def arrive(vision_depth: int, _: torch.Tensor, output: Any) -> None:
        for matched in (False, True):
            mine = [step for step in steps if (step.vision_depth, step.norm_matched) == (vision_depth, matched)]
            if not mine:
                continue
            encoded = scaled_features(output, (factors or {})[vision_depth]) if matched else output
            visit_llm_depths(
                model,
                inputs,
                encoded,
                list(dict.fromkeys(step.llm_depth for step in mine)),
                lambda depth, states, mine=mine: [visit(s, states) for s in mine if s.llm_depth == depth],  # type: ignore[misc,arg-type]
            )

    return visit_vision_depths(model, inputs, sorted({step.vision_depth for step in steps}), arrive)


def batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Cut a sequence into lists of at most `size` items."""
    for start in range(0, len(items), size):
        yield [items[number] for number in range(start, min(start + size, len(items)))]


def _check_sizes(read: list[int], expected: list[int], names: Sequence[str]) -> None:
    for name, count, tokens in zip(names, read, expected, strict=True):
        if count != tokens:
            raise ValueError(f"{name} has {count} visual tokens, its geometry {tokens}; is it the model's processor?")
