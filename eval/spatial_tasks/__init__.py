"""Spatial benchmarks: items, prompts, readings and scores. Nothing here imports an evaluation harness."""

from pathlib import Path

from .data_folder import DATA_VARIABLE, SOURCES, STAND_IN_VARIABLE, MissingDataError
from .docs import PROTOCOLS, STYLE_VARIABLE, TASKS, judge_text, load_items, make_docs, open_image
from .items import Item, circular_orders
from .scoring import Verdict, judge_orders

#: what ``lmms-eval --include_path`` is given
TASKS_DIR = Path(__file__).resolve().parents[1] / "tasks"

__all__ = [
    "DATA_VARIABLE",
    "PROTOCOLS",
    "SOURCES",
    "STAND_IN_VARIABLE",
    "STYLE_VARIABLE",
    "TASKS",
    "TASKS_DIR",
    "Item",
    "MissingDataError",
    "Verdict",
    "circular_orders",
    "judge_orders",
    "judge_text",
    "load_items",
    "make_docs",
    "open_image",
]
