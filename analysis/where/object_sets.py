"""Tokens of the two objects of a picture to be changed, with those to leave alone and those to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dualstream.analysis.object_tokens import object_tokens, outside_tokens, random_tokens, translated_control

from .items import ROLES

if TYPE_CHECKING:
    from .bench import Bench
    from .items import WhereItem


def first_items(bench: Bench, pairs: int) -> list[WhereItem]:
    """The pictures of the first pairs, for experiments with many conditions."""
    return [item for pair in bench.pairs[:pairs] for item in pair.items]


def touched_tokens(bench: Bench, item: WhereItem) -> dict[str, np.ndarray]:
    """All tokens that an object touches, by role; outside them nothing of it is left.

    ``bench.tokens`` are those that it covers by half or more: enough to look at an object, too few to change it, for
    the tokens of its rim show it too.

    Raises:
        ValueError: no token sees an object.
    """
    geometry, found = bench.geometry(bench.size(item)), {}
    for role in ROLES:
        thing = item.object(role)
        found[role] = object_tokens(geometry, thing.mask, thing.box)
        if not len(found[role]):
            raise ValueError(f"no visual token of {item.name!r} sees the {role} ({thing.name}).")
    return found


def background_tokens(bench: Bench, item: WhereItem) -> np.ndarray:
    """Tokens of a picture that neither object touches.

    Raises:
        ValueError: there is none.
    """
    own = touched_tokens(bench, item)
    free = outside_tokens(bench.geometry(bench.size(item)), np.union1d(*own.values()))
    if not len(free):
        raise ValueError(f"the two objects of {item.name!r} touch every visual token; there is no background.")
    return free


def tokens_elsewhere(bench: Bench, item: WhereItem) -> dict[str, np.ndarray]:
    """For either object, as many tokens as it touches, in its shape where that fits, off both objects.

    Raises:
        ValueError: the objects leave no token free.
    """
    geometry = bench.geometry(bench.size(item))
    own = touched_tokens(bench, item)
    taken, found = np.union1d(*own.values()), {}
    for role, tokens in own.items():
        copies = translated_control(geometry, tokens, taken, bench.seed, f"{item.name}-{role}")
        if not copies:
            free = np.setdiff1d(np.arange(len(geometry)), taken)
            copies = random_tokens(free, len(tokens), bench.seed, f"{item.name}-{role}")
            if not len(copies[0]):
                raise ValueError(f"the two objects of {item.name!r} leave no token for a control elsewhere.")
        found[role] = copies[0]
        taken = np.union1d(taken, found[role])
    return found
