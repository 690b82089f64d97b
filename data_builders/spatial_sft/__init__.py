"""Spatial SFT sets in the conversational format of TRL: What's-Up scenes, and GQA questions picked by whole words."""

import importlib
from typing import TYPE_CHECKING, Any

from .spatial_words import is_spatial
from .whats_up import AXES, FORMS, RELATIONS, WhatsUpItem, make_set, make_sets

if TYPE_CHECKING:
    from .gqa import GqaFolder, GqaQuestion, Selection, gqa_rows, select
    from .held_out import HeldOut, difference_hash
    from .rows import (
        GQA_FEATURES,
        NON_SPATIAL_FEATURES,
        WHATS_UP_FEATURES,
        conversation,
        non_spatial_row,
        split_range,
        whats_up_rows,
    )

__all__ = [
    "AXES",
    "FORMS",
    "GQA_FEATURES",
    "NON_SPATIAL_FEATURES",
    "RELATIONS",
    "WHATS_UP_FEATURES",
    "GqaFolder",
    "GqaQuestion",
    "HeldOut",
    "Selection",
    "WhatsUpItem",
    "conversation",
    "difference_hash",
    "gqa_rows",
    "is_spatial",
    "make_set",
    "make_sets",
    "non_spatial_row",
    "select",
    "split_range",
    "whats_up_rows",
]

# Which file defines each name that is imported on first use: they load the datasets library.
_HOMES = {
    "gqa": ("GqaFolder", "GqaQuestion", "Selection", "gqa_rows", "select"),
    "held_out": ("HeldOut", "difference_hash"),
    "rows": (
        "GQA_FEATURES",
        "NON_SPATIAL_FEATURES",
        "WHATS_UP_FEATURES",
        "conversation",
        "non_spatial_row",
        "split_range",
        "whats_up_rows",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name from the file that defines it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
