"""Tables and figures in running text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head; bars in cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def percent(estimate: Mapping[str, Any], digits: int = 1, signed: bool = False) -> str:
    """A share with its interval in percent, e.g. ``97.2 [96.0, 98.1]``."""
    sign = "+" if signed else ""
    value, low, high = (f"{100 * estimate[name]:{sign}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
