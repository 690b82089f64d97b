"""Tables of the report that put the rows of a suite side by side: stages, methods, largest batches."""

from __future__ import annotations

from dualstream.eval.result_tables import markdown_table

from ..prefill import FULL, LIMIT
from ..records import Record, Row
from ..stages import STAGES
from .labels import ordered_ways, rate_title
from .tables import cell, number, rows_table, significant

#: Suites whose rows a figure or a table side by side shows too: their long tables are folded away.
SHOWN_OTHERWISE, LONG_TABLE = ("headline", "peers", "memory", "growth"), 24
CASE = ("kind", "what", "batch", "visual_tokens")  # columns that a step has in common before and after


def details(record: Record, suite: str) -> str:
    """All that a record knows of a suite."""
    whole = {"stages": stage_tables, "before_after": change_table}
    if suite in whole:
        return whole[suite](record)
    own = {"peers": peer_table, "memory": batch_table, "growth": growth_lines}
    parts = [own[suite]] if suite in own else []
    tables = kind_tables(record.of(suite), LONG_TABLE if suite in SHOWN_OTHERWISE else None)
    return "\n\n".join(filter(None, [*(part(record) for part in parts), *tables]))


def kind_tables(rows: list[Row], longest: int | None = None) -> list[str]:
    """A table for every kind of row, since kinds have other columns; one table where rows have no kind.

    Args:
        rows: of a suite.
        longest: tables with more rows are folded away; none if None.
    """
    parts = []
    for kind in dict.fromkeys(row.get("kind") for row in rows):
        own = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row.get("kind") == kind]
        name = f"{kind[0].upper()}{kind[1:]}" if kind else "Everything"
        if longest is not None and len(own) > longest:
            parts.append(f"<details><summary>{name}: {len(own)} rows</summary>\n\n{rows_table(own)}\n\n</details>")
        else:
            parts.append(f"{name}:\n\n{rows_table(own)}" if kind else rows_table(own))
    return parts


def growth_lines(record: Record) -> str:
    """What every fitted curve says, in a sentence each."""
    fits = [row for row in record.of("growth") if row.get("explanation")]
    return "\n".join(f"- **{row['curve']}**, {row.get('way') or row['decoder']}: {row['explanation']}" for row in fits)


def change_table(record: Record) -> str:
    """A line per step, before and after: time, ratio, and counts of work."""
    lines, before = [], None
    for row in record.of("before_after"):
        if row["way"] == "before":
            before = row
            continue
        if before is None or any(before.get(name) != row.get(name) for name in CASE):
            raise ValueError(f"record {record.name}: step {row.get('what')!r} has no row `before` in front of it")
        after, (kind, what, *sizes) = row, (row.get(name) for name in CASE)
        counts = [f"{cell(before, name)} → {cell(after, name)}" for name in ("operations", "waits", "peak_bytes")]
        times = [cell(before, "median_ms"), cell(after, "median_ms"), cell(after, "ratio")]
        equal = cell(after, "equal")
        lines.append(
            [str(kind), str(what), *("" if size is None else number(size) for size in sizes), *times, *counts, equal]
        )
    head = ["step", "on", "batch", "visual tokens", "before, ms", "after, ms", "after / before [95 %]"]
    table = markdown_table([*head, "operations", "waits", "peak memory", "same result"], lines)
    revisions = {row["revision"] for row in record.of("before_after") if row.get("revision")}
    return f"*before* is revision {', '.join(sorted(revisions))}.\n\n{table}" if revisions else table


def batch_table(record: Record) -> str:
    """Largest batch by way and rate, with a column per way to prefill and budget."""
    rows = [row for row in record.of("memory") if row.get("kind") == "largest batch"]
    if not rows:
        return ""
    settings = list(dict.fromkeys((row["prefill"], row["budget_gib"]) for row in rows))
    lines = []
    for way, rate in dict.fromkeys((row["way"], row["reduction"]) for row in rows):
        of_line = [row for row in rows if (row["way"], row["reduction"]) == (way, rate)]
        own = {(row["prefill"], row["budget_gib"]): row for row in of_line}
        first = next(iter(own.values()))
        cells = [_batch_cell(own.get(setting)) for setting in settings]
        lines.append([way, f"{100 * rate:.3g}", cell(first, "kept_tokens"), cell(first, "kv_bytes"), *cells])
    head = ["way", "fewer visual tokens %", "kept", "keys and values of a row"]
    head += [f"{budget:g} GiB, {prefill}" for prefill, budget in settings]
    note = f"Largest batch in a budget, and how many times that of {FULL}; calculated, and checked below:"
    return f"{note}\n\n{markdown_table(head, lines)}"


def _batch_cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['batch']:,}" + ("" if row.get("ratio") is None else f" ({row['ratio']:.2f} x)")


def stage_tables(record: Record) -> str:
    """Stages of a pass in rows and ways in columns, for every batch and rate; then the other timings."""
    rows, parts = record.of("stages"), []
    passes = [row for row in rows if row["stage"] in STAGES]
    for batch, rate in dict.fromkeys((row["batch"], row["reduction"]) for row in passes):
        own = {(row["way"], row["stage"]): row for row in passes if (row["batch"], row["reduction"]) == (batch, rate)}
        ways = ordered_ways(record, (way for way, _ in own))
        lines = [
            [stage, *(_stage_cell(own.get((way, stage))) for way in ways)]
            for stage in STAGES
            if any((way, stage) in own for way in ways)
        ]
        parts.append(f"Batch {batch}, {rate_title(rate)}; median ms [quartiles], share of the way:")
        parts.append(markdown_table(["stage", *ways], lines))
    others = [row for row in rows if row["stage"] not in STAGES]
    return "\n\n".join([*parts, rows_table(others)] if others else parts)


def peer_table(record: Record) -> str:
    """Time and ratio to the limit of every method, with a column per batch and rate, beside counts of the first."""
    rows = record.of("peers")
    settings = list(dict.fromkeys((row["batch"], row["reduction"]) for row in rows))
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = {(row["batch"], row["reduction"]): row for row in rows if row["way"] == way}
        first = own.get(settings[0], {})
        cells = [_peer_cell(own.get(setting)) for setting in settings]
        lines.append([way, *(cell(first, name) for name in ("kv_bytes", "operations", "waits")), *cells])
    head = ["method", "keys and values", "operations", "waits"]
    head += [f"batch {batch}, {rate_title(rate)}" for batch, rate in settings]
    note = f"Median ms and ratio to {LIMIT} [95 %]"
    if any("full_depth_ratio" in row for row in rows):
        note += ", behind the arrow those of the whole model, computed from the times of single blocks"
    return f"{note}; bytes and counts at the first setting:\n\n{markdown_table(head, lines)}"


def _peer_cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{significant(row['median_ms'])}, {cell(row, 'ratio')}"
    if "full_depth_ratio" not in row:
        return text
    return f"{text} → {significant(row['full_depth_ms'])}, {cell(row, 'full_depth_ratio')}"


def _stage_cell(row: Row | None) -> str:
    return "" if row is None else f"{cell(row, 'median_ms')}, {100 * row['share']:.1f} %"
