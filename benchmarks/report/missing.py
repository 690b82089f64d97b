"""What the report should hold and no record has, each with the command that measures it."""

from __future__ import annotations

from collections.abc import Sequence

from dualstream.eval.result_tables import markdown_table

from ..command import REDUCTIONS
from ..records import Record
from .goals import compressed_rows

#: Figures at full size on an accelerator: the report says of each whether it was measured.
FULL_SIZE = ("llava-1.5-7b", "qwen2.5-vl-7b")
BATCHES = (1, 8)
CLOSE = 0.005
WITHOUT_SHAPE = ("micro", "overheads", "startup", "before_after")


def full_size_command(shape: str) -> str:
    """The command that measures a shape in full on a GPU."""
    batches = " ".join(map(str, BATCHES))
    return f"dualstream bench --shape {shape} --device cuda --dtype bfloat16 --batch {batches}"


def suite_command(suite: str) -> str:
    """The command that measures a suite."""
    return (
        f"dualstream bench --suites {suite}"
        if suite in WITHOUT_SHAPE
        else f"dualstream bench --shape tiny --suites {suite}"
    )


def missing_full_size(records: Sequence[Record]) -> list[tuple[str, int, list[float]]]:
    """Settings of the full shapes on CUDA in bfloat16 without a figure.

    Returns:
        Shape, batch and missing reduction rates.
    """
    found = []
    for shape in FULL_SIZE:
        measured = [
            (row["batch"], row["reduction"])
            for record in records
            if record.shape and (record.shape["name"], record.shape["device"]) == (shape, "cuda")
            if record.shape["dtype"] == "bfloat16" and not record.shape["is_reduced"]
            for row in compressed_rows(record)
        ]
        for batch in BATCHES:
            rates = [r for r in REDUCTIONS if not any(b == batch and abs(r - rate) < CLOSE for b, rate in measured)]
            if rates:
                found.append((shape, batch, rates))
    return found


def missing_section(records: Sequence[Record], unfinished: Sequence[Record], suites: Sequence[str]) -> str:
    """Markdown that names every gap and its command."""
    parts = []
    gaps = missing_full_size(records)
    if gaps:
        rows = [
            (shape, str(batch), ", ".join(f"{100 * rate:.0f}" for rate in rates), f"`{full_size_command(shape)}`")
            for shape, batch, rates in gaps
        ]
        head = ("full configuration, bfloat16, CUDA", "batch", "fewer visual tokens %", "command")
        parts.append(markdown_table(head, rows))
    absent = [suite for suite in suites if not any(record.of(suite) for record in records)]
    lines = [f"- Suite *{suite}*: `{suite_command(suite)}`" for suite in absent]
    for record in unfinished:
        done = ", ".join(record.suites) or "nothing"
        lines.append(f"- Run `{record.name}` was stopped; it has {done}, not shown here; go on: `{record.command}`")
    if lines:
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Nothing: every suite and every figure at full size has a record."
