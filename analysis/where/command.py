"""``dualstream analyze where``: how a frozen model knows where things are, experiment by experiment, with controls.

The run is resumable: every finished unit of work is a file, the same command continues after a kill, and another
``--suite`` in the same folder adds its experiments to the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, model_facts, open_model
from dualstream.eval.manifest import make_manifest, write_json

from .experiment import EXPERIMENTS, SUITES, Experiment, experiments_of, make_experiment
from .items import open_pairs

if TYPE_CHECKING:
    from .bench import Bench

SUMMARY, REPORT, COMPLETE, FIGURES = "summary.json", "report.md", "complete.json", "figures"
STATEMENTS = "statements.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--suite",
        default="all",
        metavar="NAME",
        help=f"what to run: all, {', '.join(SUITES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        default="scenes",
        help="scenes, or whatsup_b:FOLDER with bbox.jsonl and the photographs (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=48, metavar="N", help="object pairs, four pictures each (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="DIR",
        help=f"run nothing: put the statements of finished runs side by side into OUT/{STATEMENTS}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of pairs and draws (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per pass (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Do what is left of the suite and report on everything in the folder."""
    started = time.time()
    if args.compare:
        return compare(args.compare, args.out)
    names = experiments_of(args.suite)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1.")
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        bench = make_bench(args)
        summary = run_suite(bench, names, args, started)
    return Result(
        {**summary, "report": str(args.out / REPORT)}, (args.out / REPORT).read_text(encoding="utf-8").rstrip()
    )


def compare(folders: list[Path], out: Path) -> Result:
    """Write the statements of finished runs side by side.

    Args:
        folders: of the runs, each of another model or data.
        out: folder of the page.

    Raises:
        ValueError: a folder holds no finished run.
    """
    from .report import format_page

    summaries = {}
    for folder in folders:
        if not (folder / SUMMARY).is_file():
            raise ValueError(f"--compare {folder.name}: there is no {SUMMARY}; run the command for it first.")
        summaries[folder.resolve().name] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    page = format_page(summaries)
    out.mkdir(parents=True, exist_ok=True)
    (out / STATEMENTS).write_text(page, encoding="utf-8")
    return Result({"statements": str(out / STATEMENTS), "runs": list(summaries)}, page)


def make_bench(args: argparse.Namespace) -> Bench:
    """Open the pairs, then the model."""
    from .bench import Bench

    source = open_pairs(args.data, args.limit, args.seed)
    model, processor = open_model(args)
    name = args.model if not Path(args.model).exists() else Path(args.model).resolve().name
    return Bench(model, processor, source, args.seed, args.batch_size, name)


def run_suite(bench: Bench, names: list[str], args: argparse.Namespace, started: float) -> dict[str, Any]:
    """Run experiments in the run's folder, then write summary, figures and report of all that are complete there.

    Args:
        bench: what to work on.
        names: of the experiments to run.
        args: of the command.
        started: when it began, ``time.time()``.

    Raises:
        ValueError: the folder holds another run.
    """
    from dualstream.analysis.rope_scaling_study.command import weights_hash
    from dualstream.train.run_folder import claim_folder

    from .report import format_report

    facts = {**model_facts(bench.name, bench.model), "weights": weights_hash(args.model), "dtype": args.dtype}
    settings = {**bench.settings(), **facts}
    claim_folder(args.out, settings)
    skipped = {}
    for name in names:
        experiment = make_experiment(name)
        reason = experiment.reason_to_skip(bench)
        if reason is None:
            run_experiment(bench, experiment, args.out / name, settings)
        else:
            skipped[name] = reason
    summary = {
        "data": {
            "source": bench.source.kind,
            "stand_in_images": bench.source.stand_in,
            "pairs": len(bench.pairs),
            "calibration_pairs": len(bench.calibration),
            "left_out": list(bench.source.skipped),
        },
        "experiments": {name: summarize(name, args.out) for name in complete(args.out)},
        "skipped": skipped,
        "manifest": make_manifest(args.seed, started, **facts, suite=args.suite, limit=args.limit),
    }
    write_json(args.out / SUMMARY, summary)
    (args.out / REPORT).write_text(format_report(summary), encoding="utf-8")
    return summary


def run_experiment(bench: Bench, experiment: Experiment, folder: Path, settings: dict[str, Any]) -> None:
    """Write the rows that are missing, and a note when all are there: seconds spent and peak memory."""
    from dualstream.analysis.resumable_rows import ResumableRows

    note = folder / COMPLETE
    rows = ResumableRows(folder, {**settings, "experiment": experiment.name, "options": experiment.settings()})
    if note.is_file():
        return
    started, cpu = time.time(), time.process_time()
    experiment.run(bench, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cost = {"seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu, "peak_process_mib": peak}
    write_json(note, {name: round(value, 1) for name, value in cost.items()})


def complete(folder: Path) -> list[str]:
    """Names of the experiments whose rows are all there, in the order of the report."""
    return [name for name in EXPERIMENTS if (folder / name / COMPLETE).is_file()]


def summarize(name: str, folder: Path) -> dict[str, Any]:
    """Findings, tables and figures of a complete experiment, from its rows alone."""
    from dualstream.analysis.resumable_rows import ResumableRows
    from dualstream.train.run_folder import SETTINGS

    experiment = make_experiment(name)
    stored = json.loads((folder / name / SETTINGS).read_text(encoding="utf-8"))
    table = ResumableRows(folder / name, stored).table()
    figures = experiment.figures(table, folder / FIGURES)
    return {
        "title": experiment.title,
        "question": experiment.question,
        "findings": [finding.to_dict() for finding in experiment.summarize(table)],
        "tables": [shown.to_dict() for shown in experiment.tables(table)],
        "figures": [f"{FIGURES}/{path.name}" for path in figures],
        "cost": json.loads((folder / name / COMPLETE).read_text(encoding="utf-8")),
        "rows": table.num_rows,
    }
