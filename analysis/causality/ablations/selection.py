"""Which visual tokens an ablation takes: the object and its surroundings, registers, the best attributed, controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dualstream.analysis.interventions import visual_places
from dualstream.analysis.object_tokens import outside_tokens, random_tokens, translated_control, with_rings
from dualstream.modeling.families import family_of
from dualstream.processing.token_boxes import TokenGeometry

from ..prompt_rows import prompt_rows
from ..settings import uncompressed

DEVIATIONS = 2.0  # a register stands out by more than this many standard deviations


@dataclass(frozen=True)
class Condition:
    """Tokens of one picture that are replaced together.

    Attributes:
        name: e.g. ``object+1`` or ``random-20``.
        draw: number of the random draw, 0 where there is nothing random.
        tokens: (n,) ascending token indices.
    """

    name: str
    draw: int
    tokens: np.ndarray


def standing_out(scores: np.ndarray, deviations: float = DEVIATIONS) -> np.ndarray:
    """Indices of scores above mean + `deviations` x sample standard deviation, as arXiv 2410.07149 finds registers.

    Args:
        scores: (N,), e.g. norms of the language model's visual inputs.
        deviations: how far above.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) < 2:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(scores > scores.mean() + deviations * scores.std(ddof=1))


@contextmanager
def eager_language_model(model: nn.Module) -> Iterator[None]:
    """Let the language model compute attention weights that can be seen; its own kernel comes back on exit."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


@torch.no_grad()
def attention_received(model: nn.Module, inputs: Any, output: Any) -> list[np.ndarray]:
    """Attention that the text after an image pays to each of its visual tokens.

    All those columns can see all visual tokens, so no token is favoured by its place; the mean over them is taken,
    and over heads and layers with softmax attention.

    Args:
        model: a supported model, not wrapped.
        inputs: (B, L) prompts with one image each.
        output: of ``get_image_features`` for them.

    Returns:
        One (N,) float64 array per prompt.
    """
    places = visual_places(model, inputs, output)
    totals = [np.zeros(len(place.columns)) for place in places]
    layers = [block.self_attn for block in family_of(model).llm_blocks(model) if hasattr(block, "self_attn")]

    def add(_: nn.Module, args: tuple[Any, ...], result: tuple[Any, ...]) -> None:
        weights = result[1]
        for total, place in zip(totals, places, strict=True):
            readers = inputs["attention_mask"][place.row].bool().cpu()
            readers[: int(place.columns.max()) + 1] = False
            read = weights[place.row][:, readers.nonzero().flatten()][..., place.columns]
            total += read.double().mean((0, 1)).cpu().numpy()

    with eager_language_model(model):
        handles = [attention.register_forward_hook(add) for attention in layers]
        try:
            rows = prompt_rows(model, inputs, output, range(len(places)))
            model(**rows, **uncompressed(model), logits_to_keep=1, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return [total / len(layers) for total in totals]


def object_conditions(
    geometry: TokenGeometry,
    tokens: np.ndarray,
    name: str,
    seed: int = 0,
    rings: Sequence[int] = (0, 1, 2),
    draws: int = 2,
    counts: Sequence[int] = (),
) -> list[Condition]:
    """The object with growing rings, and its controls of the same size.

    Args:
        geometry: of the picture.
        tokens: of the object.
        name: of the picture, for the draws.
        seed: of the draws.
        rings: ring widths.
        draws: draws of the controls that are matched to the object.
        counts: sizes of further random sets, each contained in the next.

    Returns:
        For every ring k: ``object+k`` (``object`` for 0); for k of 0 and 1 also ``translated`` (same shape elsewhere,
        off the object) and ``random-like-object`` (same number anywhere), with ``+1`` for the ring; ``random-n`` for
        every count below N; ``outside`` and ``all``. A control that does not exist is left out.
    """
    found = []
    total = len(geometry)
    for ring in rings:
        suffix = f"+{ring}" if ring else ""
        chosen = with_rings(geometry, tokens, ring)
        found.append(Condition(f"object{suffix}", 0, chosen))
        if ring > 1:
            continue
        copies = translated_control(geometry, chosen, tokens, seed, f"{name}{suffix}", draws)
        found += [Condition(f"translated{suffix}", draw, copy) for draw, copy in enumerate(copies)]
        scattered = random_tokens(total, len(chosen), seed, f"{name} like object{suffix}", draws)
        found += [Condition(f"random-like-object{suffix}", draw, tokens_) for draw, tokens_ in enumerate(scattered)]
    for count in counts:
        if count < total:
            found.append(Condition(f"random-{count}", 0, random_tokens(total, count, seed, name)[0]))
    found.append(Condition("outside", 0, outside_tokens(geometry, tokens)))
    found.append(Condition("all", 0, np.arange(total)))
    return found


def ranked_conditions(
    prefix: str, ranking: np.ndarray, sizes: dict[str, int], counts: Sequence[int] = ()
) -> list[Condition]:
    """The first tokens of a ranking, in sizes of other sets and in fixed numbers.

    Args:
        prefix: e.g. ``ig``.
        ranking: (N,) token indices, most important first.
        sizes: name of a set to be matched (``object``) -> its size; gives ``ig-like-object``.
        counts: fixed sizes; gives ``ig-20``. Sizes of N or more are left out.
    """
    wanted = {f"{prefix}-like-{name}": size for name, size in sizes.items()}
    wanted |= {f"{prefix}-{count}": count for count in counts if count < len(ranking)}
    return [Condition(name, 0, np.sort(ranking[:size])) for name, size in wanted.items()]
