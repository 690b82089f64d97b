"""``dualstream study rope-scaling``: does a scaled vision tower answer better where things are?

The study is resumable: every finished unit is a file, and the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result
from dualstream.eval.manifest import make_manifest, write_json

from .design import NOT_PART_OF_THE_STUDY, STOCK, Study, read_study

if TYPE_CHECKING:
    from .runs import Unit

SUMMARY, REPORT, CHOICE, LATENCY, ALL_ANSWERS = (
    "summary.json",
    "report.md",
    "choice.json",
    "latency.json",
    "answers.parquet",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the study's folder")
    parser.add_argument("--config", type=Path, metavar="YAML", help="what to do (default: the published study)")
    parser.add_argument("--model", metavar="NAME", help="instead of the configuration's model")
    parser.add_argument("--seeds", type=int, help="fine-tuning runs per arm")
    parser.add_argument("--steps", type=int, help="steps of each fine-tuning run (default: one pass)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N object pairs per condition, for a look")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: %(default)s)")
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="run no further arm; those that are not finished are named as not run",
    )
    parser.add_argument("--latency", action="store_true", help="also time scaled against stock forward passes")
    parser.add_argument("--rounds", type=int, default=40, help="of the timing (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Do what is left of the study and report on it."""
    started = time.time()
    study = read_study(args.config, model=args.model, seeds=args.seeds)
    study = adjusted(study, args.steps, args.limit)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1.")
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        rounds = args.rounds if args.latency else 0
        summary = run_study(study, args.out, args.workers, rounds, started, args.report_only)
    payload = {name: summary[name] for name in ("sentence", "findings", "choice", "manifest")}
    payload |= {"latency": summary["latency"], "report": str(args.out / REPORT), "summary": str(args.out / SUMMARY)}
    return Result(payload, (args.out / REPORT).read_text(encoding="utf-8"))


def adjusted(study: Study, steps: int | None, limit: int | None) -> Study:
    """The study with another length of fine-tuning, or on fewer pictures.

    Raises:
        ValueError: a number is below 1.
    """
    from dataclasses import replace

    for name, value in (("--steps", steps), ("--limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1.")
    if steps is not None:
        study = replace(study, sft={**study.sft, "max_steps": steps})
    return study if limit is None else study.limited(limit)


def run_study(
    study: Study, out: Path, workers: int, rounds: int, started: float, report_only: bool = False
) -> dict[str, Any]:
    """Do what has no file yet, then write answers, summary, report and figures.

    Args:
        study: the study.
        out: its folder.
        workers: processes.
        rounds: of the timing, 0 for none.
        started: when the command began.
        report_only: leave out arms that are not finished, instead of finishing them.

    Raises:
        ValueError: the folder holds another study, or the stock tower is not measured.
    """
    from dualstream.train.run_folder import claim_folder

    from .figures import draw_figures
    from .report import format_report
    from .runs import Workbench, arm_units, run_units
    from .summary import read_answers, summarize

    claim_folder(out, study.settings())
    choice, grids = choose_scalings(study, out, workers)
    bench = Workbench(study, out)
    units = arm_units(study, choice, bench.stock[0])
    if not report_only:
        run_units(study, out, units, workers, "arms")
    units, not_run = finished_arms(units, out)
    summary: dict[str, Any] = {
        **summarize(study, choice, grids, read_answers(study, units, out)),
        "latency": time_scaling(bench, out, choice["plain"], rounds),
        "design": study.settings(),
        "not_run": not_run,
    }
    runs = {name: getattr(study, name) for name in NOT_PART_OF_THE_STUDY}
    summary["manifest"] = make_manifest(
        0, started, model=study.model, runs={**runs, "tuned": study.seeds}, weights=weights_hash(study.model)
    )
    gather_answers(units, out)
    write_json(out / SUMMARY, summary)
    (out / REPORT).write_text(format_report(summary), encoding="utf-8")
    draw_figures(out)
    return summary


def finished_arms(units: Sequence[Unit], out: Path) -> tuple[list[Unit], list[dict[str, Any]]]:
    """The units of arms that have all their files, and the other arms.

    Raises:
        ValueError: a stock arm is not finished: nothing could be compared with it.
    """
    open_arms = {(unit.arm, unit.tuned): None for unit in units if not unit.path(out).is_file()}
    if (STOCK, False) in open_arms or (STOCK, True) in open_arms:
        raise ValueError(f"{out}: the stock arms are not finished; run the study without --report-only first.")
    done = [unit for unit in units if (unit.arm, unit.tuned) not in open_arms]
    return done, [{"arm": arm, "tuned": tuned} for arm, tuned in open_arms]


def choose_scalings(study: Study, out: Path, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the grids on validation pictures and choose, once and for all.

    Returns:
        The choice (``plain``, ``tuned``, ``criterion``; ``rebase`` and ``lowered`` if the grid holds such), and both
        grids with their scores.
    """
    from .runs import grid_units, run_units, tuned_grid_units
    from .selection import CRITERION, choose, read_records, score

    plain = grid_units(study)
    run_units(study, out, plain, workers, "grid")
    records = read_records(plain, out)
    best = choose(records)
    others: dict[str, str] = {}
    for name, kind, raising in (("rebase", "exp", True), ("lowered", None, False)):
        with contextlib.suppress(ValueError):  # the grid may hold none
            others[name] = choose(records, kind, raising)
    tuned = tuned_grid_units(study, best)
    run_units(study, out, tuned, workers, "grid, fine-tuned")
    tuned_records = read_records(tuned, out)
    choice = {"plain": best, "tuned": choose(tuned_records), **others, "criterion": CRITERION}
    if (out / CHOICE).is_file() and json.loads((out / CHOICE).read_text(encoding="utf-8")) != choice:
        raise ValueError(f"{out / CHOICE} says otherwise than the grid beside it; use a new folder.")
    write_json(out / CHOICE, choice)

    def scored(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**record, **score(record)} for record in records]

    return choice, {"grid": scored(records), "tuned_grid": scored(tuned_records)}


def time_scaling(bench: Any, out: Path, scaling: str, rounds: int) -> dict[str, Any] | None:
    """Time scaled against stock passes, or take the figures that are there; None if there are none."""
    from .latency import measure_latency

    path = out / LATENCY
    if rounds:
        model, _ = bench.stock
        batch = bench.batches("validation")[0]
        figures = measure_latency(model, batch.inputs.to(model.device), scaling, rounds)
        write_json(path, {**figures, "scaling": scaling, "questions": len(batch.items)})
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def gather_answers(units: Sequence[Unit], out: Path) -> None:
    """Write the answers of all arms into one Parquet file."""
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(unit.path(out)).replace_schema_metadata() for unit in units]
    table = pa.concat_tables(tables)
    index = table.schema.get_field_index("nll")
    table = table.set_column(index, "nll", table["nll"].cast(pa.float32()))
    partial = out / f"{ALL_ANSWERS}.partial"
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, out / ALL_ANSWERS)


def weights_hash(model: str) -> str | None:
    """SHA-256 of an embedded or local model's weights; None for others, or where they are in several files."""
    import hashlib

    from dualstream.modeling import EMBEDDED_MODELS, default_model_path

    path = (default_model_path(model) if model in EMBEDDED_MODELS else Path(model)) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
