"""Tables of the report from rows of any suite: columns that are there, numbers with spread, units in the head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dualstream.eval.result_tables import markdown_table

Row = Mapping[str, Any]

MIB, GIB, GIGA = 2**20, 2**30, 1e9
HIDDEN = ("suite", "seed", "explanation")  # known from where the table stands, or said above it
# Columns with these names (or these endings) are shares, printed in percent.
SHARES = ("reduction", "share", "share_of_prefill", "error")
# Labels, in this order, come first; everything else follows as the rows have it.
FIRST = (
    "model",
    "job",
    "curve",
    "way",
    "decoder",
    "stage",
    "name",
    "batch",
    "images",
    "reduction",
    "prompt_tokens",
    "visual_tokens",
    "kept_tokens",
)
# Said once above the table where they are the same in all rows.
SETTINGS = ("batch", "images", "rounds", "reduction", "prompt_tokens", "visual_tokens", "kept_tokens")
TITLES = {
    "median_ms": "median ms [quartiles]",
    "reduction": "fewer visual tokens %",
    "visual_tokens": "visual tokens",
    "kept_tokens": "kept",
    "speedup": "uncompressed / this [95 %]",
    "share": "of the way %",
    "share_of_prefill": "of prefill %",
    "kv_bytes": "keys and values",
    "peak_bytes": "peak memory",
    "waits": "waits",
    "flops": "GFLOP",
}


def rows_table(rows: Sequence[Row]) -> str:
    """Lay out rows as a Markdown table, with a line above it of what is the same in all of them.

    ``X_low`` and ``X_high`` stand in brackets behind ``X``, ``q1_U`` and ``q3_U`` behind ``median_U``; columns that a
    row lacks stay empty; columns of nested values that are not a number with an interval are left out.
    """
    columns = shown_columns(rows)
    constant = [name for name in columns if name in SETTINGS and _is_constant(rows, name)]
    columns = [name for name in columns if name not in constant]
    head = [title(name, rows) for name in columns]
    body = [[cell(row, name) for name in columns] for row in rows]
    table = markdown_table(head, body)
    if not constant:
        return table
    same = ", ".join(f"{title(name, rows).removesuffix(' %')} {_with_unit(rows[0], name)}" for name in constant)
    return f"Everywhere: {same}.\n\n{table}"


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """Names of the columns of a table of these rows, in order."""
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and name not in HIDDEN and _is_cell(value):
                found[name] = None
    merged = {part for name in found for part in _spread_of(name)}
    if len(_values(rows, "ratio_to")) < 2:
        merged.add("ratio_to")  # the head of the ratios says it
    kept = [name for name in found if name not in merged]
    return [name for name in FIRST if name in kept] + [name for name in kept if name not in FIRST]


def title(name: str, rows: Sequence[Row] = ()) -> str:
    """Head of a column; that of a ratio says to what, if it is the same in all rows."""
    if name == "ratio":
        others = _values(rows, name + "_to")
        spread = " [95 %]" if _values(rows, name + "_low") else ""
        return f"ratio to {others.pop()}{spread}" if len(others) == 1 else f"ratio{spread}"
    if name in TITLES:
        return TITLES[name]
    plain = name.removesuffix("_bytes") if name.endswith("_bytes") else name
    plain = plain.replace("_", " ")
    return f"{plain} %" if _is_share(name) else plain


def cell(row: Row, name: str) -> str:
    """One cell: a number with its spread, if the row has one."""
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, dict):
        value, low, high = _interval(value)
    else:
        low, high = (row.get(part) for part in _spread_of(name))
    text = number(value, name)
    if low is None or high is None:
        return text
    return f"{text} [{number(low, name)}, {number(high, name)}]"


def number(value: Any, name: str = "") -> str:
    """A value as it stands in a cell of a column."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    if name == "reduction":
        return f"{100 * value:.3g}"
    if _is_share(name):
        return significant(100 * value)
    if name == "flops":
        return significant(value / GIGA)
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("ratio") or name == "speedup":
        return f"{value:.3f}"
    whole = isinstance(value, int) or (value.is_integer() and not name.endswith("ms"))
    return f"{int(value):,}" if whole else significant(value)


def significant(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def size(count: float) -> str:
    """Bytes in a unit that a person reads."""
    if not count:
        return "0"
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.2f} MiB" if count >= MIB / 10 else f"{count / 1024:.1f} KiB"


def _is_constant(rows: Sequence[Row], name: str) -> bool:
    return len(rows) > 1 and len(_values(rows, name)) == 1 and all(row.get(name) is not None for row in rows)


def _values(rows: Iterable[Row], name: str) -> set[str]:
    return {str(row[name]) for row in rows if row.get(name) is not None}


def _with_unit(row: Row, name: str) -> str:
    return f"{cell(row, name)} %" if _is_share(name) else cell(row, name)


def _is_share(name: str) -> bool:
    return name in SHARES or name.endswith("_share")


def _spread_of(name: str) -> tuple[str, str]:
    """Names of the two columns that hold the spread of a column."""
    if name.startswith("median"):
        return name.replace("median", "q1", 1), name.replace("median", "q3", 1)
    return f"{name}_low", f"{name}_high"


def _is_cell(value: Any) -> bool:
    if isinstance(value, dict):
        return "value" in value or "ratio" in value
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(item, int | float | str) for item in value)
    return True


def _interval(value: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    if "ratio" in value:
        return value["ratio"], value.get("ratio_low"), value.get("ratio_high")
    return value["value"], value.get("low"), value.get("high")
