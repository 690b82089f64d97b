"""Write a folder that can be pushed as a Hugging Face Space: the app, its card, its requirements, the package."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import dualstream

HERE = Path(__file__).parent
FILES = ("app.py", "README.md", "requirements.txt")
# What the app needs of the package; the other folders stay at home.
FOLDERS = ("modeling", "processing", "data_builders", "eval", "train", "analysis", "hub_cards")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "rope_scaling_study")


def export_space(folder: str | Path) -> list[str]:
    """Copy the Space and the package it imports; ``python app.py`` then runs there without an installed dualstream.

    Args:
        folder: a new or empty one.

    Returns:
        What lies at its top, sorted.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={folder} is not empty; choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(HERE / name, folder / name)
    package = folder / "dualstream"
    package.mkdir()
    for path in Path(dualstream.__file__).parent.iterdir():
        if path.suffix == ".py" or path.name == "py.typed":
            shutil.copyfile(path, package / path.name)
    for name in FOLDERS:
        source = Path(importlib.import_module(f"dualstream.{name}").__path__[0])
        shutil.copytree(source, package / name, ignore=LEFT_OUT)
    return sorted(path.name for path in folder.iterdir())
