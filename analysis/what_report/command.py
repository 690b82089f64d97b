"""``dualstream analyze report``: pages to look at, from finished runs of ``analyze what`` or read on the spot."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from dualstream.cli import Result, add_model_arguments, open_model
from dualstream.eval.manifest import make_manifest, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="output folders of `analyze what`; two are shown side by side",
    )
    add_model_arguments(parser)
    parser.set_defaults(model=None)
    parser.add_argument(
        "--data",
        default=None,
        help="pictures to read now (a folder, scenes, coco:...); with RUN: where its pictures lie, if they have moved",
    )
    parser.add_argument("--second-model", default=None, metavar="NAME", help="read by this one too, side by side")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: RUN/report, or out/report")
    parser.add_argument("--limit", type=int, default=None, help="most pictures (default: all; 20 without RUN)")
    parser.add_argument(
        "--top-k", type=int, default=5, help="words kept per cell when reading now (default: %(default)s)"
    )
    parser.add_argument("--title", default="", help="of the index")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures when reading now")


def run(args: argparse.Namespace) -> Result:
    """Write the pages, the index and ``report.json``."""
    from .build import write_report

    started = time.time()
    if not args.runs and not args.data:
        raise ValueError("give RUN folders of `dualstream analyze what`, or --data with pictures to read now.")
    sources = _runs(args) if args.runs else _models(args)
    out = args.out or (args.runs[0] / "report" if args.runs else Path("out/report"))
    report = write_report(sources, out, args.limit, args.title)
    names = [source.name for source in sources]
    manifest = make_manifest(args.seed, started, models=names)
    write_json(out / "report.json", {"models": names, "pages": report.pages, "manifest": manifest})
    payload = {"index": str(report.index), "pictures": len(report.pages), "models": names, "manifest": manifest}
    return Result(payload, f"{len(report.pages)} pages. Look at {report.index}")


def _runs(args: argparse.Namespace) -> Sequence:
    from .runs import RunSource

    models = [args.model, args.second_model]
    if len(args.runs) > 2:
        raise ValueError(f"RUN may be given at most twice, got {len(args.runs)}.")
    return [RunSource(folder, model, args.data) for folder, model in zip(args.runs, models, strict=False)]


def _models(args: argparse.Namespace) -> Sequence:
    from dualstream.analysis.annotated_images import open_annotated
    from dualstream.modeling.auto import DEFAULT_MODEL

    from .series import ModelSource

    if args.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {args.top_k}.")
    images = open_annotated(args.data, args.limit or 20, "test", args.seed)
    names = [args.model or DEFAULT_MODEL, *([args.second_model] if args.second_model else [])]
    return [ModelSource(*open_model(args, name), name, images, args.top_k) for name in names]
