"""Spatial SFT sets in the conversational format of TRL: What's-Up scenes, and GQA questions picked by whole words."""

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
from .spatial_words import is_spatial
from .whats_up import AXES, FORMS, RELATIONS, WhatsUpItem, make_set, make_sets

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
