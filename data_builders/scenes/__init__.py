"""Synthetic scenes: labelled pictures of coloured shapes with exact boxes and masks, and balanced questions."""

from .build import build_scenes, stream_scenes
from .questions import KINDS, Question, ask, caption, noun_phrases, questions
from .render import Raster, rasterize, render
from .scene import COLORS, SHAPES, SPLIT_SEEDS, TEXTURES, Scene, SceneObject, make_scene

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
