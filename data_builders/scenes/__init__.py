"""Synthetic scenes: labelled pictures of coloured shapes with exact boxes and masks, and balanced questions."""

import importlib
from typing import TYPE_CHECKING, Any

from .questions import KINDS, Question, ask, caption, noun_phrases, questions
from .render import Raster, rasterize, render
from .scene import COLORS, SHAPES, SPLIT_SEEDS, TEXTURES, Scene, SceneObject, make_scene

if TYPE_CHECKING:
    from .build import build_scenes, stream_scenes

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "SPLIT_SEEDS",
    "TEXTURES",
    "Question",
    "Raster",
    "Scene",
    "SceneObject",
    "ask",
    "build_scenes",
    "caption",
    "make_scene",
    "noun_phrases",
    "questions",
    "rasterize",
    "render",
    "stream_scenes",
]


def __getattr__(name: str) -> Any:
    """Import what makes data sets on first use (PEP 562): it loads the datasets library."""
    if name not in ("build_scenes", "stream_scenes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(".build", __name__), name)
    globals()[name] = value
    return value
