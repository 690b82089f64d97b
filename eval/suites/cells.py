"""One file per model, arm and benchmark: what a killed run has behind it, and what the tables are made from."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualstream.eval.manifest import write_json

FOLDER = "cells"


@dataclass(frozen=True)
class Cell:
    """One model under one arm on one benchmark."""

    model: str
    arm: str
    task: str

    def path(self, out: Path) -> Path:
        """Where its results lie."""
        return out / FOLDER / _file_name(self.model) / _file_name(self.arm) / f"{self.task}.json"


def read_cell(cell: Cell, out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a cell, None if it has not been run to its end.

    Args:
        cell: which one.
        out: folder of the run.
        settings: what the results depend on.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    path = cell.path(out)
    if not path.is_file():
        return None
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
        before = dict(saved["settings"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; remove it to run this part again") from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} was made with {name}={before.get(name)!r}, not {value!r}; give another --out, or the same "
                "settings"
            )
    return saved


def write_cell(cell: Cell, out: Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Save the results of a cell; a killed run leaves all of them or none."""
    path = cell.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"model": cell.model, "arm": cell.arm, "task": cell.task, "settings": settings, **results})


def weights_stamp(folder: Path) -> str:
    """Short name of the state of a local checkpoint: sizes and times of its files."""
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _file_name(text: str) -> str:
    """A file name that differs where the text does."""
    plain = re.sub(r"[^\w.@=+-]", "_", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
