"""``BENCHMARKS.md`` from the records of a folder: the same records give the same bytes, and nothing else goes in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualstream.data_builders.token_maps.atomic import atomic_file
from dualstream.eval.result_tables import markdown_table

from ..records import Record, load_folder
from . import summary
from .figures import draw
from .labels import short_title
from .missing import missing_section
from .pivots import details

FIGURES = "figures"


@dataclass(frozen=True)
class Section:
    """A part of the report that shows one suite.

    Attributes:
        suite: whose rows it shows.
        title: of the section.
        text: what is shown and how to read it.
    """

    suite: str
    title: str
    text: str


SECTIONS = (
    Section(
        "headline",
        "First token",
        "Time from the prompt on the device to the first token, pictures included. *native short* is the limit: the "
        "same model is given a prompt with as few visual tokens in the first place, so nothing is read, planned or "
        "rewritten. *native short, again* is the same function a second time: how far its ratio strays from 1 is what "
        "this machine's noise does. *compressed, X* is the product path, entering and leaving the block included, "
        "with X as visual decoder; the reduction rate is forced by a map that replaces what was read after it was "
        "read.",
    ),
    Section(
        "stages",
        "Where the time goes",
        "Stages of one forward pass, marked by hooks where modules begin and end. *joining* is what lies between "
        "pictures and language model: plan, pool, rewrite, and what every model does there. In models whose connector "
        "is a part of the vision tower, it is counted with *vision* where it cannot be told apart. *by itself*: a "
        "step on what it is given in a real call, ten times in a row. *first token*: the sum of the stages. *first "
        "token, all blocks*: the same where, in every round, the times of prefill and tower are multiplied by all "
        "blocks over measured blocks; calculated, not measured, and a little too much for what lies around the "
        "blocks. *decoding step*: what one more token costs.",
    ),
    Section(
        "micro",
        "Single operations",
        "Goal: a plan for 576 and for 1,280 tokens at batch 8 in less than 1 ms on an accelerator, with no wait but "
        "that for the final lengths. Times are of one call, out of ten in a row.",
    ),
    Section(
        "peers",
        "Other methods at the same number of tokens",
        "All methods start from the same pixels, keep the same number of visual tokens and run in turns in one "
        "process. Those that drop tokens inside the language model have the whole prompt in their first blocks.",
    ),
    Section(
        "growth",
        "How cost grows",
        "Along one variable at a time, all points of a curve in turns. Lines have the form of the work: linear, with "
        "a square where tokens see each other; they are held against FLOPs in closed form at the same points.",
    ),
    Section(
        "memory",
        "Memory",
        "Bytes of keys and values of a row, and the largest batch in a fixed budget: calculated for the whole model, "
        "also where a run measured a shorter one. *check* sets the formulas against measured peaks.",
    ),
    Section(
        "overheads",
        "Around the forward pass",
        "Building a corpus of token maps, sweeps of analyses and runs of lmms-eval, per picture, against a bare "
        "forward pass over the same pictures.",
    ),
    Section(
        "startup",
        "Start-up",
        "Time until a command or an import is ready, each in a fresh process, in turns with a Python that does "
        "nothing.",
    ),
    Section(
        "before_after",
        "What was made faster",
        "The same function at an older revision and now, in turns in one process.",
    ),
)

MEASURED = """\
- **In turns.** Ways that are compared run in one process, in another random order in every round, after warm-up rounds
  that are not counted; whatever slows the machine for a while slows all of them.
- **Medians and quartiles** are over rounds. A **ratio** is the median of the ratios of paired rounds, never a ratio of
  two medians; its interval is a bootstrap over rounds, 95 %.
- **Met, missed, undecided.** A goal is met if the whole interval keeps it, missed if the whole interval breaks it,
  else undecided.
- **Time** is wall time on a CPU; on an accelerator, events on its stream, read after the last of them.
- **Waits** are operations whose result the host must know before it goes on (on an accelerator it waits for the
  device); **operations** are dispatched tensor operations, on an accelerator about one kernel each. Both are counted,
  not timed, and are the same on every machine.
- **Peak memory** is the most bytes of tensors alive at once that a run allocates beyond weights and inputs.
- **Weights are random, configurations are real.** Time does not depend on what weights say. The number of runs of a
  picture does, so it is forced, and every reduction rate is a setting, not a finding. Shapes named *tiny* have real
  classes and toy widths: they show that everything runs, and nothing about a real model.
- **Reduced depth** is named wherever a model has fewer blocks than its checkpoint. It makes our ratios look worse than
  at full depth: reading and planning are paid once, whatever the depth, and every block that is left out would have
  saved time.
- **Load** is the number of processes that wanted to run in the minute before and after a suite. Above the number of
  cores, medians of a CPU run say little; ratios still do.
"""


def write_report(folder: str | Path, target: str | Path) -> list[Path]:
    """Render the records of a folder.

    Args:
        folder: of the records; ``FOLDER/figures`` gets the figures, and ``FOLDER/SUITE.md``, where there is one, is
            quoted in the section of that suite as a remark written by hand.
        target: the report.

    Returns:
        The report and its figures.

    Raises:
        ValueError: the folder or one of its records cannot be read, or it has no finished record.
    """
    folder, target = Path(folder), Path(target)
    finished, unfinished = load_folder(folder)
    if not finished:
        raise ValueError(f"{folder} has no finished record; measure first, e.g. `dualstream bench --out {folder}`")
    drawn = {record.name: draw(record, folder / FIGURES) for record in finished}
    remarks = {
        section.suite: (folder / f"{section.suite}.md").read_text(encoding="utf-8").strip()
        for section in SECTIONS
        if (folder / f"{section.suite}.md").is_file()
    }
    start = target.resolve().parent
    links = {
        name: {suite: [os.path.relpath(path.resolve(), start) for path in paths] for suite, paths in suites.items()}
        for name, suites in drawn.items()
    }
    text = render(finished, unfinished, links, remarks, os.path.relpath(folder.resolve(), start))
    with atomic_file(target) as file:
        file.write(text.encode())
    return [target, *(path for suites in drawn.values() for paths in suites.values() for path in paths)]


def render(
    records: Sequence[Record],
    unfinished: Sequence[Record] = (),
    figures: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    remarks: Mapping[str, str] | None = None,
    source: str = "docs/speed",
) -> str:
    """Return the report as Markdown.

    Args:
        records: finished runs.
        unfinished: runs that were stopped half-way; they are named, not shown.
        figures: links by record and suite.
        remarks: by suite, see ``write_report``.
        source: link to the folder of the records.
    """
    parts = [
        "# Benchmarks",
        f"Rendered by `dualstream bench --report` from [the records of runs]({source}); what is not in a record is "
        "not here.",
        "## Summary",
        summary.render(records),
    ]
    for section in SECTIONS:
        parts += _section(section, records, figures or {}, (remarks or {}).get(section.suite))
    parts += ["## How it was measured", MEASURED.rstrip(), "## Machines, versions, commands", _provenance(records)]
    parts += ["## Not yet measured", missing_section(records, unfinished, [section.suite for section in SECTIONS])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(
    section: Section,
    records: Sequence[Record],
    figures: Mapping[str, Mapping[str, Sequence[str]]],
    remark: str | None,
) -> list[str]:
    parts = [f"## {section.title}", section.text]
    shown = [record for record in records if record.of(section.suite)]
    if not shown:
        return [*parts, "Not yet measured; see [the command](#not-yet-measured)."]
    if remark:
        parts.append(remark)
    if section.suite == "stages":
        parts.append(summary.joining_table(shown))
    for record in shown:
        parts.append(f"### {short_title(record)} (`{record.name}`)" if len(shown) > 1 else f"`{record.name}`")
        images = [f"![{section.title}: {short_title(record)}]({link})" for link in _links(figures, record, section)]
        parts.append("\n".join(images))  # one paragraph: they stand side by side where there is room
        parts.append(details(record, section.suite))
    return parts


def _links(figures: Mapping[str, Mapping[str, Sequence[str]]], record: Record, section: Section) -> Iterable[str]:
    return figures.get(record.name, {}).get(section.suite, ())


def _provenance(records: Sequence[Record]) -> str:
    """Machines and versions once each, then a row per record and suite."""
    machines = [record.machine for record in records]
    versions = [record.versions for record in records]
    distinct = {name: _distinct(values) for name, values in (("machine", machines), ("versions", versions))}
    parts = [
        markdown_table(("machine", "what"), [(f"M{n}", _machine(m)) for n, m in enumerate(distinct["machine"], 1)]),
        markdown_table(
            ("versions", "what"),
            [(f"V{n}", ", ".join(f"{k} {v}" for k, v in m.items())) for n, m in enumerate(distinct["versions"], 1)],
        ),
    ]
    rows = []
    for record in records:
        where = f"M{distinct['machine'].index(record.machine) + 1} V{distinct['versions'].index(record.versions) + 1}"
        for suite, facts in record.suites.items():
            load = f"{facts['load_before']} → {facts['load_after']}"
            seconds = f"{facts['seconds']:.0f}"
            rows.append((f"`{record.name}`", suite, where, facts["date"], seconds, load, facts["revision"] or ""))
    head = ("record", "suite", "on", "begun (UTC)", "seconds", "load", "revision")
    commands = "\n".join(f"{record.command}    # {record.name}" for record in records)
    return "\n\n".join([*parts, markdown_table(head, rows), f"```bash\n{commands}\n```"])


def _distinct(values: Iterable[dict]) -> list[dict]:
    found: list[dict] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _machine(facts: Mapping) -> str:
    parts = [facts["system"], f"{facts['cpu']} ({facts['cores']} cores, {facts['threads']} threads used)"]
    parts.append(f"{facts['memory_gib']} GiB")
    if facts["instructions"]:
        parts.append(" ".join(facts["instructions"]))
    return ", ".join([*parts, *(facts["accelerators"] or ["no accelerator"])])
