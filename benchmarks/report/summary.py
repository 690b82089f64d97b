"""The summary of the report: goals, words for what was reached, and where the time goes where a goal is missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dualstream.eval.result_tables import markdown_table

from ..headline import CONTROL
from ..prefill import FULL, OURS
from ..records import Record, Row
from ..stages import FULL_DEPTH_SUM
from . import goals
from .labels import rate_title, short_title
from .tables import cell, significant

GOALS = (
    f"Goals: time to the first token of a compressed prompt at most {goals.LIMITS['cuda']:.2f} times that of the same "
    f"model given the short prompt natively on a GPU at 7B shapes, {goals.LIMITS['cpu']:.2f} on a CPU; reading with "
    f"the cheap decoder (`{goals.CHEAP}`), plan, pooling and rewriting together at most "
    f"{100 * goals.JOINING_SHARE:.0f} % of the prefill."
)


def render(records: Sequence[Record]) -> str:
    """The summary: goals, ratios to the limit and to the whole prompt by reduction rate, and why goals are missed."""
    shown = [record for record in records if goals.compressed_rows(record)]
    plans = [line for record in records for line in plan_lines(record)]
    if not shown:
        return "\n\n".join([GOALS, "No time to a first token has been measured yet.", *plans])
    lines = [line for record in shown for line in verdict_lines(record)] + plans
    parts = [GOALS, "\n".join(lines)]
    parts += [
        f"Compressed against natively short, n = {_rounds(shown)} rounds, with 95 % intervals:",
        ratio_table(shown),
    ]
    parts += ["The whole prompt against compressed (how many times faster the first token comes):", gain_table(shown)]
    missed = [line for record in shown for line in missed_lines(record)]
    parts.append(control_line(shown))
    if missed:
        parts += ["Where the goal is missed, and where that time goes, at the reduction rate where it is worst:"]
        parts.append("\n".join(missed))
    return "\n\n".join(parts)


def verdict_lines(record: Record) -> list[str]:
    """How many settings of a record keep the goal, by decoder, and the share of reading and planning."""
    words: dict[str, Counter[str]] = {}
    for row in goals.compressed_rows(record):
        words.setdefault(row["decoder"], Counter())[goals.headline_verdict(record, row)] += 1
    limit = goals.limit_of(record)
    if limit is None:
        return []
    parts = []
    for decoder, counts in words.items():
        found = ", ".join(
            f"{word} {counts[word]}" for word in (goals.MET, goals.UNDECIDED, goals.MISSED) if counts[word]
        )
        parts.append(f"`{decoder}` {found} of {counts.total()}")
    lines = [f"- **{short_title(record)}**, ratio at most {limit:.2f}: {'; '.join(parts)}."]
    lines += [f"  - {line}" for line in full_depth_lines(record)]
    for row in goals.joining_shares(record):
        if row["decoder"] == goals.CHEAP:
            lines.append(f"  - batch {row['batch']}: reading to rewriting takes {_share_words(record, row)}.")
    return lines


def full_depth_lines(record: Record) -> list[str]:
    """What the ratio would be with all blocks, if the model was cut: calculated, and said to be."""
    rows = [row for row in record.of("stages") if row["stage"] == FULL_DEPTH_SUM and row["way"].startswith(OURS)]
    limit, lines = goals.limit_of(record), []
    for batch, rate in dict.fromkeys((row["batch"], row["reduction"]) for row in rows):
        own = [row for row in rows if (row["batch"], row["reduction"]) == (batch, rate)]
        found = ", ".join(
            f"`{row['way'].removeprefix(OURS + ', ')}` {cell(row, 'ratio')} "
            f"({goals.verdict(row['ratio_low'], row['ratio_high'], limit)})"
            for row in own
            if limit is not None
        )
        lines.append(f"with all blocks, calculated: batch {batch}, {rate_title(rate)}: {found}.")
    return lines


def plan_lines(record: Record) -> list[str]:
    """A line per plan that has a goal."""
    return [
        f"- {record.name}: {row['way']}, {row['visual_tokens'] // goals.PLAN_BATCH:,} tokens x batch {row['batch']}: "
        f"{cell(row, 'median_ms')} ms, {row['waits']} waits; goal {goals.PLAN_MS:g} ms: {row['verdict']}."
        for row in goals.plan_rows(record)
    ]


def ratio_table(records: Sequence[Record]) -> str:
    """Ratios to the limit: a line per record, batch and decoder and one for the control, a column per rate."""
    rates = _rates(records)
    lines = []
    for record in records:
        rows = goals.compressed_rows(record)
        for batch in sorted({row["batch"] for row in rows}):
            of_batch = [row for row in rows if row["batch"] == batch]
            for decoder in dict.fromkeys(row["decoder"] for row in of_batch):
                own = {row["reduction"]: row for row in of_batch if row["decoder"] == decoder}
                cells = [_judged(record, own[rate]) if rate in own else "" for rate in rates]
                lines.append([short_title(record), str(batch), decoder, *cells])
            controls = {row["reduction"]: goals.control_of(record, row) for row in of_batch}
            cells = [cell(found, "ratio") if (found := controls.get(rate)) else "" for rate in rates]
            lines.append([short_title(record), str(batch), "*control: the limit twice*", *cells])
    return markdown_table(["model", "batch", "decoder", *map(rate_title, rates)], lines)


def gain_table(records: Sequence[Record]) -> str:
    """How many times faster the first token comes than from the whole prompt, as far as it was measured."""
    rates = _rates(records)
    lines = []
    for record in records:
        rows = [row for row in record.of("headline") if row["way"] not in (FULL, CONTROL) and row.get("speedup")]
        for batch in sorted({row["batch"] for row in rows}):
            for way in dict.fromkeys(row["way"] for row in rows if row["batch"] == batch):
                own = {row["reduction"]: row for row in rows if (row["batch"], row["way"]) == (batch, way)}
                cells = [cell(own[rate], "speedup") if rate in own else "" for rate in rates]
                lines.append([short_title(record), str(batch), way, *cells])
    return markdown_table(["model", "batch", "way", *map(rate_title, rates)], lines)


def control_line(records: Sequence[Record]) -> str:
    """How often the control, whose true ratio is 1, says something else: what an interval here is worth."""
    controls = [row for record in records for row in record.of("headline") if row["way"] == CONTROL]
    if not controls:
        return "No control was measured."
    outside = [row for row in controls if not row["ratio_low"] <= 1 <= row["ratio_high"]]
    farthest = max(controls, key=lambda row: abs(row["ratio"] - 1))
    return (
        f"Control: the true ratio of the limit to itself is 1; the 95 % interval misses it in {len(outside)} of "
        f"{len(controls)} settings (1 in 20 is expected), and the farthest ratio is {cell(farthest, 'ratio')}."
    )


def missed_lines(record: Record) -> list[str]:
    """One line per batch and decoder that misses the goal: the worst rate and where the time goes."""
    worst: dict[tuple[int, str], Row] = {}
    for row in goals.compressed_rows(record):
        if goals.headline_verdict(record, row) == goals.MISSED:
            key = row["batch"], row["decoder"]
            worst[key] = max(worst.get(key, row), row, key=lambda item: item["ratio"])
    return [
        f"- {short_title(record)}, batch {batch}, `{decoder}`, {rate_title(row['reduction'])}: {cell(row, 'ratio')}, "
        f"{goals.reason(record, row)}."
        for (batch, decoder), row in worst.items()
    ]


def joining_table(records: Sequence[Record]) -> str:
    """Share of the prefill that reading, plan, pooling and rewriting take, against the goal."""
    lines = []
    for record in records:
        for row in goals.joining_shares(record):
            steps = [significant(row[f"{step}_ms"]) for step in ("reading", *goals.STEPS, "prefill")]
            share, full = (_percent_range(row, part) for part in ("", "full_"))
            lines.append(
                [short_title(record), str(row["batch"]), row["decoder"], *steps, share, full, _share_word(row)]
            )
    if not lines:
        return ""
    steps = [f"{step} ms" for step in ("reading", "plan", "pool", "rewrite", "prefill")]
    head = ["model", "batch", "decoder", *steps, "share % [range]", "at full depth % [range]", "goal"]
    note = (
        "Steps by themselves against the prefill of the whole prompt; the range sets quartiles of the steps against "
        "opposite quartiles of the prefill. *At full depth*, where the model was cut, is the same with the measured "
        "prefill multiplied by all blocks over measured blocks: calculated, not measured."
    )
    return f"{note}\n\n{markdown_table(head, lines)}"


def _rounds(records: Sequence[Record]) -> str:
    """Numbers of rounds behind the figures of a table."""
    found = sorted({row["rounds"] for record in records for row in goals.compressed_rows(record)})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _judged(record: Record, row: Row) -> str:
    word = goals.headline_verdict(record, row)
    return f"{cell(row, 'ratio')} {word}".rstrip()


def _share_words(record: Record, row: Row) -> str:
    text = f"{_percent_range(row, '')} % of the prefill"
    if record.shape and record.shape["is_reduced"]:
        text += f" ({_percent_range(row, 'full_')} % of that of all blocks)"
    return f"{text}, goal {100 * goals.JOINING_SHARE:.0f} %: {_share_word(row)}"


def _share_word(row: Row) -> str:
    if row["decoder"] != goals.CHEAP:
        return ""
    return goals.verdict(row["full_low"], row["full_high"], goals.JOINING_SHARE)


def _percent_range(row: Row, prefix: str) -> str:
    value, low, high = (f"{100 * row[prefix + part]:.2f}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _rates(records: Sequence[Record]) -> list[float]:
    return sorted({row["reduction"] for record in records for row in record.of("headline")})
