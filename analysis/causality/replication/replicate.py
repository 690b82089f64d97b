"""``dualstream analyze replicate neo2024``: a paper's experiments as its code runs them, and mended, side by side."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, model_facts, open_model

from ..experiment import MANIFEST, REPORT, SUMMARY, TABLE, add_cost, cost_of

if TYPE_CHECKING:
    from ..ablations.replacement import Reference

STUDIES = ("neo2024",)
FIGURE, COST = "replicate.png", "cost.json"
SCENE_PIXELS = 183  # gives scenes objects of 1000 to 2000 square pixels, on a side that no grid divides
REFERENCE_PICTURES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    from dualstream.analysis.annotated_images import ACCEPTED, SPLITS

    add_model_arguments(parser)
    parser.add_argument("study", choices=STUDIES, help="whose public code: neo2024 is arXiv 2410.07149")
    parser.add_argument(
        "--data",
        default=None,
        help=f"pictures with objects: {ACCEPTED} (default: scenes of {SCENE_PIXELS} pixels, whose objects have the "
        "published area)",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=int, default=300, metavar="N", help="pictures looked at (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows, summary, report and figure")
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="JSON: picture -> question, for VQA and knockout"
    )
    parser.add_argument("--mean", type=Path, metavar="FILE", help="safetensors with the replacement vector 'mean'")
    parser.add_argument(
        "--reference", metavar="DATA", help="pictures for the mean (default: the validation split of --data)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a description (published: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and draws (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Run the pictures that are missing, then write summary, report and figure from the rows."""
    from dualstream.analysis.annotated_images import open_annotated
    from dualstream.analysis.resumable_rows import ResumableRows
    from dualstream.eval.manifest import make_manifest, write_json
    from dualstream.modeling import family_of

    from ..lenses.lens_correspondence import ClassVocabulary
    from ..targets import data_label, read_questions
    from .protocols import PROTOCOLS, Options
    from .replicate_report import format_report
    from .replicate_rows import Bench, replicate_picture
    from .replicate_summary import summarize

    started = time.time()
    data = args.data or f"scenes:{args.split}:{args.limit}:{SCENE_PIXELS}"
    options = Options(max_new_tokens=args.max_new_tokens, seed=args.seed)
    questions = read_questions(args.questions) if args.questions else None
    images = open_annotated(data, args.limit, args.split, args.seed)
    model, processor = open_model(args)
    facts = {
        **model_facts(args.model, model),
        "data": data_label(data),
        "split": args.split,
        "questions": args.questions.name if args.questions else None,
        "mean": args.mean.name if args.mean else None,
        "reference": data_label(reference_name(args.reference or data)),
    }
    identity = {key: value for key, value in facts.items() if key != "data"}  # more pictures continue a run
    settings = {"command": f"analyze replicate {args.study}", **identity, "dtype": str(model.dtype), **asdict(options)}
    rows = ResumableRows(args.out, settings)
    missing = [image for image in images if image.name not in rows]
    if missing:
        reference = open_reference(model, processor, args, reference_name(args.reference or data))
        vocabulary = ClassVocabulary(processor.tokenizer, len(model.get_output_embeddings().weight))
        bench = Bench(model, processor, reference, vocabulary, questions, options)
        _run_missing(bench, missing, rows, len(images), replicate_picture)
    table = rows.table([image.name for image in images])
    layers = len(family_of(model).llm_blocks(model))
    windows = {name: protocol(options).windows(layers) for name, protocol in PROTOCOLS.items()}
    summary = {**facts, "options": asdict(options), "windows": windows, **summarize(table)}
    write_json(args.out / SUMMARY, summary)
    write_files(args.out, table, summary)
    manifest = make_manifest(args.seed, started, **facts, pictures=len(images), cost=cost_of(args.out))
    write_json(args.out / MANIFEST, manifest)
    return Result({"summary": summary, "manifest": manifest}, format_report(summary))


def reference_name(data: str) -> str:
    """Where the replacement values come from: the validation split of the data."""
    if str(data).partition(":")[0] != "scenes":
        return str(data)
    pixels = (str(data).split(":") + [""] * 3)[3] or str(SCENE_PIXELS)
    return f"scenes:validation:{REFERENCE_PICTURES}:{pixels}"


def open_reference(model: Any, processor: Any, args: argparse.Namespace, name: str) -> Reference:
    """Replacement values: means over validation pictures, or a vector of one's own.

    Raises:
        ValueError: the vector does not fit the model.
    """
    from dualstream.analysis.annotated_images import open_annotated

    from ..ablations.replacement import collect_reference, take_mean

    images = open_annotated(name, REFERENCE_PICTURES, "validation", args.seed)
    reference = collect_reference(model, processor, images, seed=args.seed)
    if args.mean:
        take_mean(reference, args.mean)
    return reference


def _run_missing(bench: Any, missing: list[Any], rows: Any, total: int, work: Any) -> None:
    from tqdm import tqdm

    with tqdm(total=total, initial=total - len(missing), unit="picture", disable=None) as bar:
        for image in missing:
            cpu, wall = time.process_time(), time.time()
            found = work(bench, image)
            add_cost(rows.folder / COST, time.process_time() - cpu, time.time() - wall, 1)
            rows.write(image.name, found)
            bar.update()


def write_files(folder: Path, table: Any, summary: dict[str, Any]) -> None:
    """Write all rows as one Parquet file, the figure, and the report."""
    import pyarrow.parquet as pq

    from dualstream.data_builders.token_maps.atomic import atomic_file

    from .replicate_report import draw, format_report

    with atomic_file(folder / TABLE) as file:
        pq.write_table(table, file, compression="zstd")
    draw(summary, folder / FIGURE)
    (folder / REPORT).write_text(
        format_report(summary) + f"\n\n![right answers destroyed]({FIGURE})\n", encoding="utf-8"
    )
