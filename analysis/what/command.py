"""``dualstream analyze what``: how a picture turns into words, by depth of the vision tower and the language model.

OUT holds rows/ (one Parquet file per picture, columns in ``depth_maps``), inside/ and lenses/ (rows of the other
measurements), vocabulary.parquet, tuned_lens.safetensors, summary.json, report.md, manifest.json and the figures. A
run that was killed goes on where it was; another run's folder is refused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from dualstream.cli import Result, add_model_arguments, model_facts, open_model

SHOWN = 4  # pictures in maps.png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="a folder of pictures, read as they are")
    source.add_argument(
        "--data",
        metavar="SOURCE",
        help="pictures with objects: scenes, coco:ANNOTATIONS.json:DIR, gqa:SCENE_GRAPHS.json:DIR, whatsup_b:DIR",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--limit", type=int, default=200, help="test pictures (default: %(default)s)")
    parser.add_argument(
        "--validation", type=int, default=100, help="pictures that choices are made on (default: %(default)s)"
    )
    parser.add_argument(
        "--train", type=int, default=100, help="pictures to fit the tuned lens on, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--inside", type=int, default=60, help="pictures for attention, similarity, clusters (default: %(default)s)"
    )
    parser.add_argument("--labels", metavar="SCHEMA", help="scenes, coco or a YAML file (default: what fits the data)")
    parser.add_argument(
        "--llm-depth", type=int, metavar="K", help="language-model blocks to read after (default: chosen; see report)"
    )
    parser.add_argument(
        "--first-pieces", action="store_true", help="count the first piece of a long word for the word"
    )
    parser.add_argument("--top-k", type=int, default=5, help="readings kept per cell (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per pass (default: %(default)s)")
    parser.add_argument(
        "--throughput", type=int, default=0, metavar="N", help="also time N pictures against a full forward per depth"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, controls and fits (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Do the run, or the rest of it."""
    from dualstream.eval.manifest import make_manifest, write_json

    from .figures import draw_figures, draw_maps
    from .report import write_report
    from .study import Options, Study
    from .summary import plain, summarize
    from .throughput import measure

    started = time.time()
    options = Options(
        data=args.images or args.data,
        limit=args.limit,
        validation=args.validation,
        train=args.train,
        inside=args.inside,
        labels=args.labels,
        llm_depth=args.llm_depth,
        first_pieces=args.first_pieces,
        top_k=args.top_k,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    model, processor = open_model(args)
    study = Study(model, processor, args.model, args.out, options)
    study.run()
    summary = summarize(study)
    if args.throughput:
        pictures = [image.image() for image in study.test[: args.throughput]]
        summary["throughput"] = plain(measure(study.lenses, processor, pictures, options.batch_size))
    write_json(args.out / "summary.json", summary)
    facts = {**model_facts(study.name, model), "readout_sha256": study.settings["readout"]}
    manifest = make_manifest(args.seed, started, **facts)
    write_json(args.out / "manifest.json", manifest)
    figures = [path.name for path in draw_figures(args.out)]
    shown = list(study.pictures(study.test[:SHOWN]))
    maps = draw_maps(
        shown, study.vocabulary, shown_depths(study.vision_depths, study.native), study.depth, args.out / "maps.png"
    )
    figures.append(maps.name)
    report = write_report(summary, manifest, figures)
    (args.out / "report.md").write_text(report, encoding="utf-8")
    return Result({**summary, "out": args.out.name, "figures": figures}, _text(summary, args.out))


def shown_depths(depths: Any, native: int, count: int = 6) -> list[int]:
    """At most `count` vision depths spread over all, the native one among them."""
    last = len(depths) - 1
    spread = {round(place * last / (count - 1)) for place in range(count)} if last >= count else set(depths)
    nearest = min(spread, key=lambda depth: abs(depth - native))
    return sorted(spread - {nearest} | {native})


def _text(summary: dict[str, Any], out: Path) -> str:
    from .report import VERDICTS, interval, verdict_sentence

    lines = [f"{summary['model']}: {summary['images']} pictures, read after {summary['llm_depth']} LLM blocks"]
    if "emergence" in summary:
        best = next(
            row for row in summary["emergence"] if row["llm_depth"] == summary["llm_depth"] and row["lens"] == "normed"
        )
        lines.append(
            f"cells in boxes that name the object: {interval(best['emergence'])}, random labels "
            f"{interval(best['control'])}"
        )
        for kind, label in VERDICTS.items():
            if f"verdict_{kind}" in summary["stages"]:
                depth = summary["stages"][kind.rpartition("_")[2]]["llm_depth"]
                sentence = verdict_sentence(summary["stages"][f"verdict_{kind}"])
                lines.append(f"two stages, {label.lower()}, {depth} LLM blocks: {sentence}")
    lines.append(f"wrote {out / 'report.md'}")
    return "\n".join(lines)
