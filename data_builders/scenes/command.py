"""``dualstream build scenes``: drawn scenes as a dataset folder, with splits that share no scene."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result

if TYPE_CHECKING:
    from dualstream.data_builders.dataset_card import CardText

CONFIG = "default"
SAMPLES, SAMPLE_COLUMNS = 8, 4
BOX = "left, top, right, bottom in pixels, right and bottom exclusive"
COLUMNS = {
    "image": "the picture, PNG",
    "seed": "draws this scene again: `make_scene(seed)`",
    "width": "pixels",
    "height": "pixels",
    "caption": "all objects in a sentence",
    "objects": f"shape, colour and texture of every object; `box`: {BOX}; `mask`: run lengths of its visible "
    "pixels row by row, outside first (`decode_mask`)",
    "questions": "one question of every kind that the scene admits; `objects`: the numbers of those it is about",
}
LIMITS = (
    "Flat coloured shapes. What a model does here says little about photographs.",
    "`direction` questions can be guessed from one object's place more often than not; `relation` questions cannot.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the dataset; resumable")
    for split, number in (("train", 10_000), ("validation", 1000), ("test", 1000)):
        parser.add_argument(f"--{split}", type=int, default=number, metavar="N", help=f"scenes, default {number}")
    parser.add_argument("--size", type=int, default=96, help="shorter side in pixels (default: %(default)s)")
    parser.add_argument("--aspect", type=float, default=1.0, help="width divided by height (default: %(default)s)")
    parser.add_argument("--shard-rows", type=int, default=1000, help="rows of a file (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Draw the scenes and write Parquet, card and a sheet of samples."""
    from dualstream.data_builders.dataset_card import dataset_card
    from dualstream.data_builders.shard_folder import ShardFolder

    from .build import FEATURES, scene_row
    from .scene import split_seeds

    sizes = {split: getattr(args, split) for split in ("train", "validation", "test")}
    _check(args, sizes)
    seeds = {split: split_seeds(split, count) for split, count in sizes.items()}
    settings = {**sizes, "size": args.size, "aspect": args.aspect, "shard_rows": args.shard_rows}
    folder = ShardFolder(args.out, settings)
    rows: dict[str, int] = {}
    for split, count in sizes.items():

        def drawn(start: int, stop: int, split: str = split) -> Any:
            return (scene_row(seed, args.size, args.aspect) for seed in seeds[split][start:stop])

        rows[split] = folder.write(CONFIG, split, count, drawn, FEATURES, args.shard_rows)
    first = next(seeds[split] for split, count in sizes.items() if count)
    _draw_samples(args.out / "samples.png", first[:SAMPLES], args.aspect)
    command = "dualstream build scenes " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings.items())
    text = _card_text(_count_questions(args.out), sizes)
    card = dataset_card(text, {CONFIG: rows}, {CONFIG: FEATURES}, COLUMNS, command)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    folder.save(rows={CONFIG: rows})
    shown = ", ".join(f"{split} {count}" for split, count in rows.items())
    return Result({"out": str(args.out), "rows": {CONFIG: rows}}, f"{shown} scenes in {args.out}")


def _check(args: argparse.Namespace, sizes: dict[str, int]) -> None:
    least = {**dict.fromkeys(sizes, 0), "size": 8, "aspect": 0.1, "shard_rows": 1}
    for name, limit in least.items():
        if getattr(args, name) < limit:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {getattr(args, name)}; accepted are numbers from {limit}.")
    if not any(sizes.values()):
        raise ValueError(f"--{', --'.join(sizes)} are all 0; ask for at least one scene.")


def _count_questions(out: Path) -> Counter[str]:
    """Kind -> number of questions in the files as they lie there."""
    import pyarrow.parquet as pq

    from .questions import KINDS

    counts: Counter[str] = Counter()
    for path in sorted((out / CONFIG).glob("*.parquet")):
        for row in pq.read_table(path, columns=["questions"]).column("questions").to_pylist():
            counts.update(KINDS[question["kind"]] for question in row)
    return counts


def _draw_samples(path: Path, seeds: range, aspect: float) -> None:
    """One sheet of the first scenes."""
    from PIL import Image

    from .render import render
    from .scene import make_scene

    pictures = [render(make_scene(seed, aspect), 160) for seed in seeds]
    width, height = pictures[0].size
    columns = min(SAMPLE_COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * (width + 8) + 8, -(-len(pictures) // columns) * (height + 8) + 8), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (8 + number % columns * (width + 8), 8 + number // columns * (height + 8)))
    sheet.save(path)


def _card_text(kinds: Counter[str], sizes: dict[str, int]) -> CardText:
    from dualstream.data_builders.dataset_card import CardText

    table = "\n".join(f"| {kind} | {count} |" for kind, count in sorted(kinds.items()))
    return CardText(
        title="Scenes",
        summary=f"{sum(sizes.values()):,} drawn pictures of one to six coloured shapes on a cluttered backdrop, with "
        "exact boxes and masks, a caption, and questions whose answers follow from the drawing.\n\n"
        "![Samples](samples.png)",
        provenance="Drawn by dualstream, no photographs. The same seed gives the same scene, at any size.",
        license="apache-2.0",
        tags=("synthetic", "spatial", "bounding-boxes", "segmentation-masks"),
        limits=LIMITS,
        sections={
            "Questions": "| kind | questions |\n|---|---|\n" + table,
            "Splits": "The seeds of the splits are disjoint ranges: no scene of one occurs in another.",
        },
        task_categories=("visual-question-answering", "image-to-text", "object-detection"),
    )
