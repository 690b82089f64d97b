"""The knockout experiment on one picture: every route in every window, from one encoding and one cached prefix.

By causality a cut changes nothing before its first destination, so keys and values up to there are those of the plain
pass. Cells are grouped by their first destination and only what follows is computed again: for a route to the last
position that is one column. Models whose image tokens read each other forwards, or whose windows drop columns from
the cache, are computed whole.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dualstream.analysis.interventions import encoded_images
from dualstream.modeling.families import Family, family_of
from dualstream.modeling.lens import unwrapped

from ..ablations.ablation import Picture
from ..prompt_rows import prompt_rows
from ..settings import outcome_of, prepare, query_of, uncompressed
from .attention_masks import Block, KnockoutReport
from .knockout import Support, knockout, knockout_support
from .routes import PAPER_ROUTES, Groups, ends_of, groups_of, windows_of

BASELINE = "none"


@dataclass(frozen=True)
class KnockoutPlan:
    """What to run; all of it decides the rows.

    Attributes:
        settings: ways of asking that are judged by the first token: ``vqa``, ``polling``.
        routes: see ``routes.ROUTES``.
        windows: see ``routes.windows_of``.
        each_head: also cut every head by itself, in every window.
        draw: number of the random controls' draw.
        seed: of random controls.
    """

    settings: tuple[str, ...] = ("vqa", "polling")
    routes: tuple[str, ...] = PAPER_ROUTES
    windows: str = "paper"
    each_head: bool = False
    draw: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if "generative" in self.settings:
            raise ValueError("setting='generative' is not judged by a first token; use vqa or polling.")
        for route in self.routes:
            ends_of(route)


@dataclass
class Cell:
    """One entry of the table for one picture."""

    route: str
    window: str
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    sources: torch.Tensor
    destinations: torch.Tensor


@dataclass
class Prefill:
    """The plain pass over one prompt: what the language model was given, its cache and its answer.

    Attributes:
        call: keyword arguments of the language model, of one row.
        cache: keys and values of all columns.
        logits: (V,) at the last position.
    """

    call: dict[str, Any]
    cache: Any
    logits: torch.Tensor
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.call["inputs_embeds"].shape[1]


@torch.no_grad()
def prefill(model: nn.Module, rows: dict[str, Any]) -> Prefill:
    """Run one prompt and keep what a later part of it can be computed from.

    Args:
        model: a supported model, not wrapped.
        rows: inputs of one row without padding, images encoded (``prompt_rows``).
    """
    seen: dict[str, Any] = {}

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = family_of(model).language_model(model).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        output = model(**rows, **uncompressed(model), use_cache=True, logits_to_keep=1)
    finally:
        handle.remove()
    call = {name: seen.get(name) for name in ("inputs_embeds", "position_ids", "visual_pos_masks")}
    call["deepstack_visual_embeds"] = seen.get("deepstack_visual_embeds")
    return Prefill(call, output.past_key_values, output.logits[0, -1])


@torch.no_grad()
def rerun(
    model: nn.Module, plain: Prefill, start: int, blocks: Sequence[Sequence[Block]], verify: bool
) -> tuple[torch.Tensor, KnockoutReport]:
    """Compute the columns from `start` on again, as many rows as there are sets of blocks.

    Args:
        model: a supported model, not wrapped.
        plain: of ``prefill``.
        start: first column to compute; nothing before it may be a destination.
        blocks: of each row; their `row` is overwritten.
        verify: see ``knockout``.

    Returns:
        Logits (R, V) at the last position, and the probe's report.
    """
    family, count = family_of(model), len(blocks)
    call = _suffix(plain.call, start, count)
    if start:
        cache = copy.deepcopy(plain.cache)
        cache.crop(start - plain.length)  # a negative number of columns is taken off the end
        cache.batch_repeat_interleave(count)
        call["past_key_values"] = cache
    embeds = call["inputs_embeds"]
    call["attention_mask"] = torch.ones(count, plain.length, dtype=torch.long, device=embeds.device)
    flat = [
        Block(row, block.sources, block.destinations, block.layers, block.heads, block.keep_self)
        for row, own in enumerate(blocks)
        for block in own
    ]
    with knockout(model, flat, verify=verify) as report:
        hidden = family.language_model(model)(**call, use_cache=bool(start)).last_hidden_state
    return family.unembedding(model)(hidden[:, -1]), report


def _suffix(call: dict[str, Any], start: int, count: int) -> dict[str, Any]:
    """Arguments of the language model for the columns from `start` on, repeated for `count` rows."""
    new: dict[str, Any] = {"inputs_embeds": call["inputs_embeds"][:, start:].expand(count, -1, -1)}
    positions = call["position_ids"]
    if positions is not None:  # (axes, 1, L) for rotary positions in several axes, (1, L) otherwise
        shape = (*positions.shape[:-2], count, -1)
        new["position_ids"] = positions[..., start:].expand(shape)
    visual = call["visual_pos_masks"]
    if visual is not None and bool(visual[:, start:].any()):
        skipped = int(visual[:, :start].sum())
        new["visual_pos_masks"] = visual[:, start:].expand(count, -1)
        new["deepstack_visual_embeds"] = [
            layer[skipped:].repeat(count, 1) for layer in call["deepstack_visual_embeds"]
        ]
    return new


def cells_of(groups: Groups, plan: KnockoutPlan, support: Support) -> list[Cell]:
    """All cells of the plan that exist for a picture; layers without edges are left out of a window."""
    cells = []
    for route in plan.routes:
        source, destination = ends_of(route)
        sources, destinations = groups.of(source), groups.of(destination)
        if sources is None or destinations is None:
            continue
        for window, layers in windows_of(plan.windows, support.layers).items():
            layers = tuple(layer for layer in layers if layer in support.cuttable)
            heads: list[tuple[int, ...] | None] = [None]
            if plan.each_head:
                heads += [(head,) for head in range(support.heads)]
            cells += [Cell(route, window, layers, chosen, sources, destinations) for chosen in heads]
    return cells


def knockout_picture(
    model: nn.Module, processor: Any, picture: Picture, plan: KnockoutPlan, verify: bool = True
) -> tuple[list[dict[str, Any]], list[KnockoutReport]]:
    """Run all cells of a plan on one picture.

    Args:
        model: a supported model, possibly wrapped by PEFT.
        processor: its processor.
        picture: of ``open_picture``, with at least one object token.
        plan: what to run.
        verify: whether the probe measures the cut edges of every group of cells.

    Returns:
        One row per setting and cell, and one for the plain answer (route ``none``); the probe's reports.

    Raises:
        ValueError: the model's kernel takes no mask.
        KnockoutError: a cut did not take effect.
    """
    model = unwrapped(model)
    family, support = family_of(model), knockout_support(model)
    rows: list[dict[str, Any]] = []
    reports: list[KnockoutReport] = []
    output = None
    for setting in plan.settings:
        query = query_of(picture.target, setting)
        inputs = prepare(processor, [picture.image], [query]).to(model.device)
        if output is None:
            with torch.no_grad():
                output = encoded_images(model, inputs)
        plain = prefill(model, prompt_rows(model, inputs, output, [0]))
        groups = _groups(model, family, picture, inputs, plan)
        cells = cells_of(groups, plan, support)
        answers, found = _answers(model, plain, cells, support, verify)
        reports += found
        first = _row(picture, setting, Cell(BASELINE, BASELINE, (), None, *[torch.zeros(0)] * 2))
        rows.append(first | outcome_of(processor, query, plain.logits).to_dict())
        for cell, logits in zip(cells, answers, strict=True):
            rows.append(_row(picture, setting, cell) | outcome_of(processor, query, logits).to_dict())
    return rows, reports


def _groups(model: nn.Module, family: Family, picture: Picture, inputs: Any, plan: KnockoutPlan) -> Groups:
    return groups_of(
        inputs["input_ids"][0],
        family.image_token_id(model.config),
        picture.geometry,
        picture.tokens,
        picture.target.image.name,
        inputs["attention_mask"][0],
        plan.seed,
        plan.draw,
    )


def _answers(
    model: nn.Module, plain: Prefill, cells: list[Cell], support: Support, verify: bool
) -> tuple[list[torch.Tensor], list[KnockoutReport]]:
    """Logits (V,) of every cell, computed in groups with the same first destination."""
    whole = support.bidirectional or bool(support.sliding)
    by_start: dict[int, list[int]] = {}
    for number, cell in enumerate(cells):
        by_start.setdefault(0 if whole else int(cell.destinations.min()), []).append(number)
    answers: dict[int, torch.Tensor] = {}
    reports = []
    for start, numbers in sorted(by_start.items()):
        blocks = [
            [Block(0, cells[n].sources, cells[n].destinations, cells[n].layers, cells[n].heads)] for n in numbers
        ]
        logits, report = rerun(model, plain, start, blocks, verify)
        answers.update(zip(numbers, logits, strict=True))
        reports.append(report)
    return [answers[number] for number in range(len(cells))], reports


def _row(picture: Picture, setting: str, cell: Cell) -> dict[str, Any]:
    return {
        "image": picture.target.image.name,
        "object": picture.target.name,
        "setting": setting,
        "route": cell.route,
        "window": cell.window,
        "layers": list(cell.layers),
        "head": -1 if cell.heads is None else cell.heads[0],
        "n_sources": len(cell.sources),
        "n_destinations": len(cell.destinations),
        "n_visual": len(picture.geometry),
    }
