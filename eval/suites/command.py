"""``dualstream eval``: run models under several arms on the same samples of a suite, and compare the arms.

Everything is checked before a model is loaded. Each model, arm and task is saved when it is done, so the same command
goes on after a kill, and a further arm or model can be added to a folder.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments
from dualstream.eval.manifest import make_manifest, write_json

from .benchmarks import ALL, SUITES, Benchmark, benchmarks_of
from .cells import Cell, read_cell, weights_stamp, write_cell
from .harness import (
    Tasks,
    Views,
    data_settings,
    documents_of,
    leave_processes,
    require_harness,
    run_benchmark,
    scenes_of,
)
from .report import draw, group_tables
from .summary import summarize

if TYPE_CHECKING:
    from dualstream.eval.arms import Arm

DEFAULT_ARMS = "none,rle,rle_drop_top1,rle_drop_top2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser, several=True)
    parser.add_argument("--suite", required=True, metavar="SUITE", help=f"{', '.join(SUITES)} or {ALL}")
    parser.add_argument("--tasks", metavar="TASK,...", help="only these of the suite (default: all)")
    parser.add_argument(
        "--arms",
        default=DEFAULT_ARMS,
        metavar="ARM,...",
        help="methods (rle, paper:rle, rle:position_policy=compact), baselines (random@rle, stride@0.4, "
        "neighbours@rle, tome@rle, pool2x2, llm_map), each also with scaled RoPE (none+poly:99:8); none is always run "
        "(default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of every task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go and are found again")


def run(args: argparse.Namespace) -> Result:
    """Run what is missing, then compare and write ``table.md``, ``summary.json`` and ``accuracy.png``."""
    from dualstream.eval.arms import parse_arms

    started = time.time()
    require_harness()
    arms, benchmarks = parse_arms(args.arms), benchmarks_of(args.suite, args.tasks)
    _check(args)
    with scenes_of(args.limit):
        documents = {benchmark: documents_of(benchmark, args.limit) for benchmark in benchmarks}
        settings = {b: _settings(args) | data_settings(b) | {"documents": documents[b]} for b in benchmarks}
        order = [(Cell(m, a.text, b.name), a, b) for m in args.model for b in benchmarks for a in arms]
        todo = [part for part in order if read_cell(part[0], args.out, _of(part, settings, args)) is None]
        if todo:
            _run_cells(args, todo, documents, settings)
            leave_processes()
        if int(os.environ.get("RANK", "0")):
            return Result({}, "")  # the first of several processes has it all
        cells = {}
        for part in order:
            found = read_cell(part[0], args.out, _of(part, settings, args))
            if found is None:
                raise ValueError(f"{part[0].path(args.out)} is not there although the run ended")
            cells[part[0].model, part[0].arm, part[0].task] = found
    rows = summarize(cells, benchmarks)
    return _report(args, rows, cells, started)


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if len(set(args.model)) < len(args.model):
        raise ValueError(f"--model names a model twice: {' '.join(args.model)}")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What every result depends on."""
    return {
        "limit": args.limit,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "rope_scaling": args.rope_scaling,
        "lmms_eval": version("lmms-eval"),
    }


def _of(part: tuple[Cell, Arm, Benchmark], settings: dict[Benchmark, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings of one cell."""
    return settings[part[2]] | {"weights": _weights(part[0].model)}


def _weights(model: str) -> str | None:
    """The state of a local checkpoint, None for one of the Hub."""
    from dualstream.modeling.auto import EMBEDDED_MODELS, default_model_path

    folder = default_model_path(model) if model in EMBEDDED_MODELS else Path(model)
    return weights_stamp(folder) if folder.is_dir() else None


def _run_cells(
    args: argparse.Namespace,
    todo: Sequence[tuple[Cell, Arm, Benchmark]],
    documents: dict[Benchmark, int | None],
    settings: dict[Benchmark, Any],
) -> None:
    from tqdm import tqdm

    from dualstream.eval.prompt_costs import kv_bytes_per_token

    tasks = Tasks(list(dict.fromkeys(benchmark for _, _, benchmark in todo)))
    with tqdm(total=len(todo), unit="run", disable=None) as bar:
        for name in dict.fromkeys(cell.model for cell, _, _ in todo):
            views = Views(
                pretrained=name,
                device=args.device,
                dtype=args.dtype,
                rope_scaling=args.rope_scaling,
                batch_size=args.batch_size,
            )
            for cell, arm, benchmark in (part for part in todo if part[0].model == name):
                bar.set_description(f"{name}, {arm}, {benchmark.name}")
                begun = time.time()
                view, folder = views.of(benchmark, arm), args.out / "harness"
                results = run_benchmark(view, tasks[benchmark], benchmark, documents[benchmark], folder)
                if results:
                    results["kv_bytes_per_token"] = kv_bytes_per_token(views.model)
                    results["seconds"] = round(time.time() - begun, 2)
                    write_cell(cell, args.out, _of((cell, arm, benchmark), settings, args), results)
                bar.update()


def _report(
    args: argparse.Namespace, rows: list[dict[str, Any]], cells: dict[Any, dict[str, Any]], started: float
) -> Result:
    manifest = make_manifest(
        0,
        started,
        models=args.model,
        suite=args.suite,
        limit=args.limit,
        batch_size=args.batch_size,
        rope_scaling=args.rope_scaling,
        lmms_eval=version("lmms-eval"),
        seconds_of_all_runs=round(sum(cell["seconds"] for cell in cells.values()), 1),
    )
    harness = {"/".join(key): cell["harness"] for key, cell in cells.items()}
    payload = {"summary": rows, "harness": harness, "manifest": manifest}
    text = group_tables(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(f"{_heading(args, manifest)}\n\n{text}", encoding="utf-8")
    write_json(args.out / "summary.json", payload)
    draw(rows, args.out / "accuracy.png")
    return Result(payload, text.rstrip())


def _heading(args: argparse.Namespace, manifest: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    return (
        f"# Arms on suite {args.suite}\n\n`{manifest['command']}`\n\n"
        "![accuracy against tokens saved](accuracy.png)\n\n"
        f"lmms-eval {manifest['lmms_eval']}, {versions}; batches of {args.batch_size}; all runs together "
        f"{manifest['seconds_of_all_runs'] / 60:.0f} minutes."
    )
