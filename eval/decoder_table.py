"""``dualstream decoders``: what visual decoders cost, how well they read, what their compression does to answers."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dualstream.cli import Result, add_model_arguments, model_facts, open_model

from .manifest import make_manifest, write_json

SUMMARY, PER_IMAGE, ANSWERS, FIGURE = "decoders.json", "agreement.parquet", "answers.parquet", "decoders.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--decoder", nargs="+", default=[], metavar="DIR", help="folders of decoders to measure beside the shipped one"
    )
    parser.add_argument("--images", type=int, default=300, help="pictures that are read (default: %(default)s)")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="read the pictures of this folder, not scenes")
    parser.add_argument(
        "--questions", type=int, default=300, help="scene questions answered, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--method", default="rle", help="compression of the questions' pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--depth", type=int, default=None, help="blocks after which the language model's map is read (default: all)"
    )
    parser.add_argument("--no-final-norm", action="store_true", help="read that map without the final norm")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="shorter side in pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument(
        "--context-length",
        type=int,
        default=1024,
        help="keys an LLM token attends to, for the share of its cost (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and questions")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"write {SUMMARY}, {PER_IMAGE}, {ANSWERS} and {FIGURE}"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure, print the tables and write the files asked for."""
    from .decoder_comparison import ComparisonSettings, collect_decoders, compare_decoders
    from .decoder_report import draw_figure, format_report

    started = time.time()
    settings = ComparisonSettings(
        images=args.images,
        questions=args.questions,
        method=args.method,
        depth=args.depth,
        final_norm=not args.no_final_norm,
        split=args.split,
        image_size=args.image_size,
        batch_size=args.batch_size,
        context_length=args.context_length,
        seed=args.seed,
    )
    pictures = load_photos(args.photos, args.images) if args.photos else None
    model, processor = open_model(args)
    decoders = collect_decoders(model, args.decoder)
    comparison = compare_decoders(model, processor, decoders, settings, pictures)
    trained = {name: decoder.training_facts for name, decoder in decoders.items()}
    facts = model_facts(args.model, model)
    manifest = make_manifest(args.seed, started, **facts, photos=bool(args.photos), decoders=trained)
    payload = {**comparison.to_dict(), "manifest": manifest}
    if args.out:
        from datasets import Dataset

        args.out.mkdir(parents=True, exist_ok=True)
        for name, rows in ((PER_IMAGE, comparison.per_image), (ANSWERS, comparison.answers)):
            if rows:
                Dataset.from_list(rows).to_parquet(args.out / name)
        write_json(args.out / SUMMARY, payload)
        draw_figure(args.out / SUMMARY, args.out / FIGURE)
    return Result(payload, format_report(payload))


def load_photos(folder: Path, most: int) -> dict:
    """Read the first pictures of a folder, in order of name.

    Raises:
        ValueError: fewer than two files, or one that is no picture.
    """
    from dualstream.processing import load_image

    paths = sorted(path for path in folder.iterdir() if path.is_file())[:most]
    if len(paths) < 2:
        raise ValueError(f"--photos {folder} holds {len(paths)} files; at least 2 pictures are needed.")
    return {path.name: load_image(path) for path in paths}
