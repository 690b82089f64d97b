"""``dualstream bench``: measure, and render what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from dualstream.cli import Result

DEFAULT_FOLDER = Path("docs/speed")
DEFAULT_REPORT = Path("BENCHMARKS.md")
# Papers' reduction rates: run lengths on Qwen2.5-VL and LLaVA-1.5, without meaningless runs on both.
REDUCTIONS = (0.16, 0.28, 0.32, 0.49, 0.58)
EPILOG = """examples:
  dualstream bench                                          the tiny shape, every suite of a model, a few minutes
  dualstream bench --shape llava-1.5-7b --layers 4 --vision-layers 4
  dualstream bench --shape qwen2.5-vl-7b --device cuda --batch 1 8
  dualstream bench --suites micro overheads startup before_after  what is measured without a shape
  dualstream bench --report                                 render BENCHMARKS.md from the records

A run that was stopped goes on after its last finished suite when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dualstream bench``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--shape",
        default=None,
        metavar="S",
        help="configuration to build with random weights: tiny, tiny-qwen2-vl, "
        "tiny-qwen2.5-vl, tiny-qwen3-vl, tiny-internvl (real classes, toy widths), llava-1.5-7b, qwen2-vl-2b, "
        "qwen2.5-vl-7b, qwen3-vl-8b, internvl3-8b (default: tiny)",
    )
    add(
        "--suites",
        nargs="+",
        default=None,
        metavar="NAME",
        help="headline, stages, peers, growth, memory, and, "
        "without a shape, micro, overheads, startup, before_after (default: all that measure a shape)",
    )
    add("--layers", type=int, default=None, metavar="N", help="cut the language model to N blocks (default: all)")
    add("--vision-layers", type=int, default=None, metavar="N", help="cut the vision tower to N blocks (default: all)")
    add("--image-size", default=None, metavar="HxW", help="pixels of the pictures (default: the shape's)")
    add("--batch", type=int, nargs="+", default=[1], metavar="B", help="rows of a batch (default: 1)")
    add("--images", type=int, default=1, metavar="N", help="pictures of a row (default: 1)")
    add("--text-tokens", type=int, default=48, metavar="N", help="tokens of text of a row (default: 48)")
    add(
        "--reductions",
        type=float,
        nargs="+",
        default=list(REDUCTIONS),
        metavar="R",
        help="shares of visual tokens to remove (default: %(default)s)",
    )
    add(
        "--detail",
        type=float,
        default=0.49,
        metavar="R",
        help="share removed in stages, peers, growth (default: 0.49)",
    )
    add(
        "--decoders",
        nargs="+",
        default=["pruned", "linear"],
        metavar="KIND",
        help="what reads the features: pruned, linear, factored, unembedding (default: pruned linear)",
    )
    add("--rounds", type=int, default=15, metavar="N", help="measured rounds of every comparison (default: 15)")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: an accelerator if there is one)")
    add(
        "--dtype", default="auto", help="float32, bfloat16, float16 (default: bfloat16; float32 for toy shapes on CPU)"
    )
    add("--threads", type=int, default=None, metavar="N", help="threads of the CPU (default: torch's choice)")
    add("--out", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="folder of records (default: docs/speed)")
    add("--name", default=None, help="of the record (default: from shape, depth, device and dtype)")
    add("--restart", action="store_true", help="forget what an earlier run of that name left unfinished")
    add("--revision", default=None, help="older revision that before_after compares with (default: the recorded one)")
    add(
        "--report",
        nargs="?",
        type=Path,
        const=DEFAULT_REPORT,
        default=None,
        metavar="FILE",
        help="render all records "
        "of the folder, after measuring if a shape or suites are given (default: BENCHMARKS.md)",
    )


def run(args: argparse.Namespace) -> Result:
    """Measure what was asked for, then render the report if that was asked for.

    Raises:
        ValueError: an option is unknown or does not suit the shape, or a record cannot be read.
    """
    payload: dict[str, object] = {}
    text = []
    if args.report is None or args.shape is not None or args.suites is not None:
        path, rows = _measure(args)
        payload |= {"record": str(path), "rows": rows}
        text.append(_summary(rows) + f"\nrecord: {path}")
    if args.report is not None:
        from .report.page import write_report

        written = write_report(args.out, args.report)
        payload["report"] = [str(path) for path in written]
        text.append(f"report: {args.report}")
    return Result(payload, "\n".join(text))


def _measure(args: argparse.Namespace) -> tuple[Path, list[dict[str, object]]]:
    from tqdm import tqdm

    from .records import RunLog, command_line
    from .suites import MODEL_SUITES, SUITES, check_suites, open_bench

    names = check_suites(args.suites or list(MODEL_SUITES))
    with tqdm(unit=" runs", desc="bench", disable=None) as bar:
        bench = open_bench(args, with_model=any(name in MODEL_SUITES for name in names), progress=bar.update)
        log = RunLog(args.out, bench.name, command_line(), bench.shape, bench.settings, restart=args.restart)
        for name in names:
            bar.set_description(name)
            if not log.done(name):
                log.add(name, SUITES[name](bench))
    rows = log.record.rows
    return log.finish(), rows


def _summary(rows: list[dict[str, object]]) -> str:
    """A line per row of the headline, else how many rows were measured."""
    from .headline import describe

    headline = [row for row in rows if row["suite"] == "headline"]
    return describe(headline) if headline else f"{len(rows)} rows measured"
