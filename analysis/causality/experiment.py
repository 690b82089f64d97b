"""What the ablation and the knockout command share: options, the choice of pictures, the frame of a run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, model_facts

if TYPE_CHECKING:
    from dualstream.analysis.resumable_rows import ResumableRows

    from .ablations.ablation import Picture
    from .targets import Selection

SUMMARY, REPORT, MANIFEST, TABLE, COST = "summary.json", "report.md", "manifest.json", "table.parquet", "cost.json"
PICTURES_PER_UNIT = 16
OVERSAMPLING = 2  # scenes opened per picture wanted; a little more than half of them have an object to ask for


def add_run_arguments(parser: argparse.ArgumentParser, settings: Sequence[str]) -> None:
    """Add the arguments of both commands.

    Args:
        parser: of the command.
        settings: ways of asking by default.
    """
    from dualstream.analysis.annotated_images import ACCEPTED, SPLITS

    from .settings import ALL_SETTINGS

    add_model_arguments(parser)
    parser.add_argument("--data", default="scenes", help=f"pictures with objects: {ACCEPTED} (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="pictures asked about (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows, tables, report and figures")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, draws and intervals (default: %(default)s)")
    parser.add_argument(
        "--settings",
        default=",".join(settings),
        metavar="NAME,...",
        help=f"ways of asking, of {', '.join(ALL_SETTINGS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="JSON: picture -> question, for the vqa setting"
    )
    parser.add_argument("--synonyms", type=Path, metavar="FILE", help="one class per line, its names between commas")
    parser.add_argument(
        "--coverage",
        type=float,
        default=0.0,
        help="least share of a token that the object covers; 0: any overlap (default: %(default)s)",
    )
    parser.add_argument(
        "--area", metavar="LEAST,MOST", help="square pixels of the object (arXiv 2410.07149: 1000,2000; default: any)"
    )


def rounded(value: Any, digits: int = 6) -> Any:
    """The same nested object with numbers of few significant digits, so that files stay small."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def manifest_of(args: argparse.Namespace, facts: dict[str, Any], started: float) -> dict[str, Any]:
    """The manifest of a run: what identifies it, and what its rows took over all starts."""
    from dualstream.eval.manifest import make_manifest

    own = {name: value for name, value in facts.items() if name not in ("command", "seed")}
    return make_manifest(args.seed, started, **own, cost=cost_of(args.out))


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def settings_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The ways of asking of a run.

    Raises:
        ValueError: one is unknown.
    """
    from .settings import ALL_SETTINGS

    found = names(args.settings)
    unknown = [name for name in found if name not in ALL_SETTINGS]
    if unknown:
        raise ValueError(f"setting={unknown[0]!r} is unknown; accepted are {', '.join(ALL_SETTINGS)}.")
    return found


def choose_pictures(args: argparse.Namespace, processor: Any) -> tuple[list[Picture], Selection]:
    """Open the data and choose what is asked for, with an account of what every rule removed.

    Raises:
        ValueError: an option is wrong, or no picture passes.
    """
    from dualstream.analysis.annotated_images import open_annotated

    from .ablations.ablation import open_picture
    from .targets import read_questions, read_synonyms, select_targets

    if args.limit < 1:
        raise ValueError(f"limit must be at least 1, got {args.limit}.")
    generated = str(args.data).partition(":")[0] == "scenes"
    images = open_annotated(args.data, OVERSAMPLING * args.limit if generated else None, args.split, args.seed)
    selection = select_targets(
        images,
        need_question="vqa" in names(args.settings),
        questions=read_questions(args.questions) if args.questions else None,
        synonyms=read_synonyms(args.synonyms) if args.synonyms else None,
        area=parse_area(args.area),
        seed=args.seed,
    )
    pictures: dict[str, Picture] = {}
    passed = []
    for target in selection.targets:
        picture = open_picture(processor, target, args.coverage) if len(pictures) < args.limit else None
        passed.append(picture is None or bool(len(picture.tokens)))
        if picture is not None and passed[-1]:
            pictures[target.image.name] = picture
    selection.require("an object that the processor leaves on a token", passed)
    selection.require(f"among the first {args.limit}", [t.image.name in pictures for t in selection.targets])
    if not pictures:
        raise ValueError(f"no picture of {args.data!r} passes the rules: {selection.funnel}.")
    return [pictures[target.image.name] for target in selection.targets], selection


def identity(args: argparse.Namespace, model: Any, command: str) -> dict[str, Any]:
    """What decides the rows of a run: command, model, data and rules."""
    from .targets import data_label

    return {
        "command": command,
        **model_facts(args.model, model),
        "dtype": str(model.dtype),
        "data": data_label(args.data),
        "split": args.split,
        "limit": args.limit,
        "coverage": args.coverage,
        "area": args.area,
        "questions": args.questions.name if args.questions else None,
        "synonyms": args.synonyms.name if args.synonyms else None,
        "seed": args.seed,
    }


def parts(pictures: Sequence[Picture], begin: int, end: int) -> Iterator[tuple[str, Sequence[Picture]]]:
    """Pictures ``begin`` to ``end`` by units of ``PICTURES_PER_UNIT``, each with the number of its first one."""
    for start in range(begin, end, PICTURES_PER_UNIT):
        yield f"{start:06d}", pictures[start : min(start + PICTURES_PER_UNIT, end)]


def run_missing(
    rows: ResumableRows, units: dict[str, Sequence[Picture]], work: Callable[[Sequence[Picture]], list[dict[str, Any]]]
) -> None:
    """Do what has no rows yet, with a bar over pictures; what it cost is added up over all starts of a run.

    Args:
        rows: of the run.
        units: name of a unit -> its pictures.
        work: gives the rows of some pictures.
    """
    from tqdm import tqdm

    total = sum(len(pictures) for pictures in units.values())
    done = sum(len(pictures) for name, pictures in units.items() if name in rows)
    with tqdm(total=total, initial=done, unit="picture", disable=None) as bar:
        for name, pictures in units.items():
            if name in rows:
                continue
            cpu, wall = time.process_time(), time.time()
            found = work(pictures)
            add_cost(rows.folder / COST, time.process_time() - cpu, time.time() - wall, len(pictures))
            rows.write(name, found)
            bar.update(len(pictures))


def write_results(
    args: argparse.Namespace,
    facts: dict[str, Any],
    started: float,
    summary: dict[str, Any],
    write_files: Callable[[Path, dict[str, Any]], None],
    format_report: Callable[[dict[str, Any]], str],
) -> Result:
    """Write the summary of a run, the tables, figures and report drawn from it, and the manifest.

    Args:
        args: of the command.
        facts: of ``identity``, and what else decides the rows.
        started: seconds since the epoch.
        summary: all figures; written and shown with six digits.
        write_files: writes tables, figures and report of a summary into a folder.
        format_report: the summary as Markdown, for the terminal.
    """
    from dualstream.eval.manifest import write_json

    summary = rounded({**facts, **summary})
    write_json(args.out / SUMMARY, summary)
    write_files(args.out, summary)
    manifest = manifest_of(args, facts, started)
    write_json(args.out / MANIFEST, manifest)
    return Result({"summary": summary, "manifest": manifest}, format_report(summary))


def write_report(folder: Path, entries: list[dict[str, Any]], figures: dict[str, str], text: str) -> None:
    """Write a table as Parquet, and the report with its figures.

    Args:
        folder: of the run, with the figures.
        entries: rows of the table.
        figures: file -> title.
        text: Markdown.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dualstream.data_builders.token_maps.atomic import atomic_file

    with atomic_file(folder / TABLE) as file:
        pq.write_table(pa.Table.from_pylist(entries), file, compression="zstd")
    pictures = "\n\n".join(f"![{title}]({name})" for name, title in figures.items())
    (folder / REPORT).write_text(f"{text}\n\n{pictures}\n", encoding="utf-8")


def add_cost(path: Path, cpu: float, wall: float, pictures: int) -> None:
    """Add seconds and pictures to the account of a run, which survives a kill."""
    import json

    from dualstream.eval.manifest import write_json

    from .run_cost import peak_memory_mib

    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(
        path,
        {
            "cpu_seconds": round(known.get("cpu_seconds", 0.0) + cpu, 3),
            "wall_seconds": round(known.get("wall_seconds", 0.0) + wall, 3),
            "pictures": known.get("pictures", 0) + pictures,
            "peak_memory_mib": max(known.get("peak_memory_mib", 0.0), peak_memory_mib()),
        },
    )


def cost_of(folder: Path) -> dict[str, Any]:
    """What the rows of a run took: seconds of processor and clock, pictures, largest memory."""
    import json

    path = folder / COST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def parse_area(text: str | None) -> tuple[float, float] | None:
    """Read ``LEAST,MOST``; None stays None.

    Raises:
        ValueError: these are not two numbers.
    """
    if text is None:
        return None
    try:
        least, most = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"area={text!r} is no LEAST,MOST in square pixels, e.g. 1000,2000.") from None
    return least, most
