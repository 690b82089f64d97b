"""Which edges a knockout cuts: routes between groups of columns, and windows of layers.

The last position of a prompt can learn of an object directly (object -> last), through the text between picture and
answer (object -> question -> last), or through other visual tokens (object -> visual). A route names groups for source
and destination, joined by ``+`` where several are cut at once. The six routes of arXiv 2410.07149 and its six windows
are among them; its key PATCH_TO_LAST_ROW, misnamed there, is ``visual->last-row`` here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dualstream.analysis.object_tokens import last_row, outside_tokens, random_tokens, translated_control, with_rings
from dualstream.processing.token_boxes import TokenGeometry

PAPER_DEPTH = 32
# Layers counted from 0, both ends included, of a model with 32 layers. Layer 10 lies in early-mid and all only.
PAPER_WINDOWS = {"early": (0, 9), "early-mid": (5, 14), "mid": (11, 20), "mid-late": (15, 24), "late": (21, 31)}
PAPER_ROUTES = (
    "object->last",
    "object+1->last",
    "object+2->last",
    "outside+1->last",
    "object+1->last-row",
    "visual->last-row",
)
ROUTES = (
    *PAPER_ROUTES,
    "visual->last",
    "question->last",
    "object+1->question",
    "object+1->question,last",
    "visual->question",
    "visual->question,last",
    "object+1->visual",
    "visual->object+1",
    "visual->visual",
    "object+1->visual,question,last",
    "translated+1->last",
    "translated+1->question",
    "translated+1->question,last",
    "translated+1->visual,question,last",
    "random-like-question->last",
)
# Which control belongs to a route: as many sources of the same shape elsewhere, or as many scattered ones.
CONTROLS = {
    "object+1->last": "translated+1->last",
    "object+1->question": "translated+1->question",
    "object+1->question,last": "translated+1->question,last",
    "object+1->visual,question,last": "translated+1->visual,question,last",
    "question->last": "random-like-question->last",
}


@dataclass(frozen=True)
class Groups:
    """Columns of one prompt by what stands there; each (n,) long, ascending.

    ``before`` is the text before the picture, ``question`` all text behind it up to the last position (the user's
    words and the template's), ``last`` the position that answers. A group that does not exist (a control that fits
    nowhere) is missing.
    """

    columns: dict[str, torch.Tensor]

    def of(self, names: str) -> torch.Tensor | None:
        """Columns of one or several groups (``question,last``); None if one of them is missing.

        Raises:
            ValueError: a name is unknown.
        """
        parts = []
        for name in names.split(","):
            if name not in GROUP_NAMES:
                raise ValueError(f"group={name!r} is unknown; accepted are {', '.join(GROUP_NAMES)}.")
            if name not in self.columns:
                return None
            parts.append(self.columns[name])
        return torch.cat(parts).unique()


GROUP_NAMES = (
    "before",
    "question",
    "last",
    "visual",
    "last-row",
    "object",
    "object+1",
    "object+2",
    "outside",
    "outside+1",
    "translated",
    "translated+1",
    "random-like-object",
    "random-like-object+1",
    "random-like-question",
)


def groups_of(
    input_ids: torch.Tensor,
    image_token_id: int,
    geometry: TokenGeometry,
    tokens: np.ndarray,
    name: str,
    attention_mask: torch.Tensor | None = None,
    seed: int = 0,
    draw: int = 0,
) -> Groups:
    """Find all groups in a prompt with one image.

    Args:
        input_ids: (L,) of the prompt, with placeholders.
        image_token_id: of a placeholder.
        geometry: of the image.
        tokens: of the object.
        name: of the picture, for random controls.
        attention_mask: (L,), 0 at padding; None: no padding.
        seed: of random controls.
        draw: number of the draw.

    Raises:
        ValueError: if placeholders and geometry do not fit, or nothing follows the image.
    """
    visual = (input_ids == image_token_id).nonzero().flatten().cpu()
    real = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).nonzero().flatten().cpu()
    if len(visual) != len(geometry):
        raise ValueError(f"the prompt has {len(visual)} image placeholders, the geometry {len(geometry)} tokens.")
    last, end = int(real[-1]), int(visual[-1])
    if last <= end:
        raise ValueError("the prompt ends with the image: there is no position that answers.")
    question = real[(real > end) & (real < last)]
    found = {
        "before": real[real < visual[0]],
        "question": question,
        "last": real[-1:],
        "visual": visual,
        "last-row": visual[last_row(geometry)],
    }
    for ring in (0, 1, 2):
        suffix = f"+{ring}" if ring else ""
        chosen = with_rings(geometry, tokens, ring)
        found[f"object{suffix}"] = visual[chosen]
        if ring == 2:
            continue
        found[f"outside{suffix}"] = visual[outside_tokens(geometry, chosen)]
        copies = translated_control(geometry, chosen, tokens, seed, f"{name}{suffix}", draw + 1)
        if len(copies) > draw:
            found[f"translated{suffix}"] = visual[copies[draw]]
        scattered = random_tokens(len(geometry), len(chosen), seed, f"{name} like object{suffix}", draw + 1)[draw]
        found[f"random-like-object{suffix}"] = visual[scattered]
    elsewhere = outside_tokens(geometry, with_rings(geometry, tokens, 1))
    scattered = random_tokens(elsewhere, len(question), seed, f"{name} like question", draw + 1)[draw]
    if len(scattered) == len(question):
        found["random-like-question"] = visual[scattered]
    return Groups({key: columns for key, columns in found.items() if len(columns)})


def ends_of(route: str) -> tuple[str, str]:
    """Source and destination groups of a route.

    Raises:
        ValueError: it is not ``SOURCES->DESTINATIONS`` of known groups.
    """
    source, arrow, destination = route.partition("->")
    names = [*source.split(","), *destination.split(",")]
    if not arrow or not all(name in GROUP_NAMES for name in names):
        raise ValueError(
            f"route={route!r} is unknown; write SOURCES->DESTINATIONS with groups, joined by commas, of: "
            f"{', '.join(GROUP_NAMES)}."
        )
    return source, destination


def windows_of(kind: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Windows of layers by name.

    Args:
        kind: ``paper`` (the five of arXiv 2410.07149, scaled from 32 layers to the model's, and ``all``), ``single``
            (every layer by itself, and ``all``), ``width:W`` (all windows of W layers, and ``all``), ``all``, or
            layers such as ``3-5``.
        layers: of the model.

    Raises:
        ValueError: the kind is unknown or a window lies outside the model.
    """
    everything = {"all": tuple(range(layers))}
    if kind == "all":
        return everything
    if kind == "paper":
        named = {}
        for name, (first, final) in PAPER_WINDOWS.items():
            start = min(round(first * layers / PAPER_DEPTH), layers - 1)
            stop = max(round((final + 1) * layers / PAPER_DEPTH), start + 1)
            named[name] = tuple(range(start, stop))
        return named | everything
    word, _, number = kind.partition(":")
    if kind == "single" or (word == "width" and number.isdecimal()):
        width = 1 if kind == "single" else int(number)
        if not 1 <= width <= layers:
            raise ValueError(f"windows={kind!r}: a window of {width} layers does not fit the model's {layers}.")
        starts = range(layers - width + 1)
        named = {f"{s}" if width == 1 else f"{s}-{s + width - 1}": tuple(range(s, s + width)) for s in starts}
        return named | everything
    first_text, dash, last_text = kind.partition("-")
    if dash and first_text.isdecimal() and last_text.isdecimal() and int(first_text) <= int(last_text) < layers:
        return {kind: tuple(range(int(first_text), int(last_text) + 1))}
    raise ValueError(
        f"windows={kind!r} is unknown for {layers} layers; accepted are paper, single, width:W, all, FIRST-LAST."
    )
