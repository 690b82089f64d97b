"""E6: objects erased from the picture, from the visual tokens, or inside the language model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.analysis.interventions import edited_features, edited_states
from dualstream.analysis.object_tokens import generator
from dualstream.eval.option_scores import option_probabilities

from ..axis_questions import axis_question, score_questions
from ..effects import option_margin
from ..experiment import Experiment, Finding, ReportTable, pending
from ..items import ROLES
from ..object_sets import background_tokens, first_items, tokens_elsewhere, touched_tokens
from ..states import CONNECTOR, Place, read_places
from .erase_effects import CORE, ELSEWHERE, NONE, OBJECTS, PIXELS, REST
from .erased_pictures import FILLINGS, covered, filled, free_box, painted
from .relation_directions import sites_of

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

    from dualstream.analysis.interventions import VisualPlace
    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench
    from ..items import WhereItem

MOST_PAIRS = 20
BANK = 512  # background tokens of other pictures to draw from


@dataclass(frozen=True)
class Erasure:
    """What is erased, where, and with what it is filled.

    Attributes:
        what: ``objects``, ``subject``, ``reference``, ``elsewhere`` (as much, off both objects), ``core`` (the
            objects' tokens that they cover by half), ``rest`` (all but the objects), or ``none``.
        filling: ``mean``, ``resample`` or ``other``.
        site: a place in the model, None for the picture itself.
    """

    what: str
    filling: str = ""
    site: Place | None = None

    @property
    def level(self) -> str:
        """P for the picture, C for the connector, Lk for the language model after k blocks."""
        return "" if self.what == NONE else PIXELS if self.site is None else self.site.label

    @property
    def unit(self) -> str:
        """Name of its file."""
        return self.what if self.what == NONE else f"{self.level}-{self.what}-{self.filling}"


class Erase(Experiment):
    """Erase the objects and ask for their relation."""

    name = "erase"
    title = "Erasing the objects"
    question = (
        "Does the answer hang on the tokens of the two objects themselves? They are replaced by background, in the "
        "picture, behind the connector or inside the language model; the control erases as much of the picture "
        "elsewhere. All tokens that an object touches are replaced, or only its core, those it covers by half; "
        "what survives is held by other tokens, or has been read by then."
    )

    def settings(self) -> dict[str, Any]:
        """Fillings, and how many pairs are asked about."""
        return {"fillings": list(FILLINGS), "bank": BANK, "most_pairs": MOST_PAIRS}

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """One unit per erasure."""
        erasures = {erasure.unit: erasure for erasure in erasures_of(bench)}
        if set(erasures) <= rows.done:
            return
        banks = background_banks(bench, sites_of(bench))
        for unit in pending(list(erasures), rows, self.title):
            found = []
            for part in bench.batches(first_items(bench, MOST_PAIRS)):
                found += _ask(bench, erasures[unit], part, banks)
            rows.write(unit, found)

    def summarize(self, table: pa.Table) -> list[Finding]:
        """Per level: whether erasing the objects costs more than erasing as much elsewhere."""
        from .erase_effects import findings

        return findings(table.to_pandas())

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """Every erasure against the model as it is."""
        from .erase_effects import change_table

        return [change_table(table.to_pandas())]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """Losses by level."""
        from .erase_figures import draw_losses

        return [draw_losses(table.to_pandas(), folder / f"{self.name}.png")]


def erasures_of(bench: Bench) -> list[Erasure]:
    """All erasures: everything at the picture and the connector, the objects and the control deeper."""
    found = [Erasure(NONE)]
    for site in (None, *sites_of(bench)):
        shallow = site is None or site.stage == CONNECTOR
        fillings = FILLINGS if shallow else ("resample",)
        found += [Erasure(what, filling, site) for what in (OBJECTS, ELSEWHERE) for filling in fillings]
        if shallow:
            found += [Erasure(role, "resample", site) for role in ROLES]
        if site is not None:
            found += [Erasure(CORE, "resample", site), Erasure(REST, "mean", site)]
    return found


def background_banks(bench: Bench, places: Sequence[Place]) -> dict[Place, torch.Tensor]:
    """Background tokens of pictures that are kept apart, (M, d) at every place."""
    parts: dict[Place, list[torch.Tensor]] = {place: [] for place in places}
    items = [item for pair in bench.calibration for item in pair.items]
    for part in bench.batches(items):
        states: dict[Place, torch.Tensor] = {}
        sizes = read_places(bench, bench.inputs(part), places, states.__setitem__)
        for place in places:
            for item, own in zip(part, states[place].split(sizes), strict=True):
                parts[place].append(own[torch.from_numpy(background_tokens(bench, item))])
    found = {}
    for place, tokens in parts.items():
        every = torch.cat(tokens)
        order = generator(bench.seed, "bank").permutation(len(every))[:BANK]
        found[place] = every[torch.from_numpy(order)]
    return found


def _ask(
    bench: Bench, erasure: Erasure, items: Sequence[WhereItem], banks: dict[Place, torch.Tensor]
) -> list[dict[str, Any]]:
    questions = [axis_question(item, bench.relations) for item in items]
    asked: Sequence[WhereItem] = items
    context: Any = nullcontext()
    if erasure.what != NONE and erasure.site is None:
        asked = [_repainted(bench, erasure, item) for item in items]
    elif erasure.site is not None:
        edit = partial(_refilled, bench, erasure, items, banks[erasure.site])
        if erasure.site.stage == CONNECTOR:
            context = edited_features(bench.model, edit)
        else:
            context = edited_states(bench.model, erasure.site.depth, edit)
    with context:
        scores = score_questions(bench, asked, questions)
    answers = [question.answer for question in questions]
    margins, shares = option_margin(scores, answers), option_probabilities(scores)
    return [
        {
            "level": erasure.level,
            "order": -1 if erasure.site is None else erasure.site.number,
            "what": erasure.what,
            "filling": erasure.filling,
            "pair_id": item.pair_id,
            "item": item.name,
            "axis": item.axis,
            "correct": float(margins[number] > 0),
            "margin": float(margins[number]),
            "probability": float(shares[number, answers[number]]),
        }
        for number, item in enumerate(items)
    ]


def _refilled(
    bench: Bench,
    erasure: Erasure,
    items: Sequence[WhereItem],
    bank: torch.Tensor,
    states: torch.Tensor,
    at: VisualPlace,
) -> torch.Tensor:
    item = items[at.image]
    rng = generator(bench.seed, item.name, erasure.unit)
    own, background = touched_tokens(bench, item), background_tokens(bench, item)
    if erasure.what == REST:
        tokens = background
    else:
        if erasure.what == ELSEWHERE:
            own = tokens_elsewhere(bench, item)
        elif erasure.what == CORE:
            own = {role: bench.tokens(item, role) for role in ROLES}
        roles = (erasure.what,) if erasure.what in ROLES else ROLES
        tokens = np.unique(np.concatenate([own[role] for role in roles]))
        background = np.setdiff1d(background, tokens) if erasure.what == ELSEWHERE else background
    filling = erasure.filling
    if filling == "other" and at.stage == "deepstack":  # the bank holds the connector's output alone
        filling = "resample"
    return filled(states, tokens, background, filling, bank, rng)


def _repainted(bench: Bench, erasure: Erasure, item: WhereItem) -> WhereItem:
    """The item with another picture; it is painted when it is opened."""

    def opened() -> Image:
        rng = generator(bench.seed, item.name, erasure.unit)
        objects = [item.object(role).box for role in ROLES]
        if erasure.what == ELSEWHERE:
            taken, boxes = covered(objects, bench.size(item)), []
            for box in objects:
                boxes.append(free_box(box, taken, rng))
                taken = taken | covered(boxes, bench.size(item))
        else:
            boxes = objects if erasure.what == OBJECTS else [item.object(erasure.what).box]
        spare = bench.calibration[int(rng.integers(len(bench.calibration)))].items[0]
        other = (spare.image(), [spare.object(role).box for role in ROLES])
        return painted(item.image(), boxes, objects, erasure.filling, other, rng)

    return replace(item, picture=replace(item.picture, open_image=opened))
