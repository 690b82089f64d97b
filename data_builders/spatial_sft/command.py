"""``dualstream build spatial-sft``: conversational data sets about where things are, from scenes or from GQA."""

from __future__ import annotations

import argparse
import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

from dualstream.cli import Result

SPLITS = ("train", "validation", "test")
SOURCES = ("scenes", "gqa")
CONFIGS = ("spatial", "non_spatial")
SHARD_UNITS = {"scenes": 250, "gqa": 1000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("--source", choices=SOURCES, default="scenes", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the data set; resumable")
    for split, default in zip(SPLITS, (1000, 100, 200), strict=True):
        help_text = f"size of {split}: sets of four pictures (scenes) or questions (gqa)"
        parser.add_argument(
            f"--{split}", type=int, default=default, metavar="N", help=f"{help_text}, default {default}"
        )
    scenes = parser.add_argument_group("from scenes")
    scenes.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default: %(default)s)")
    scenes.add_argument(
        "--form", choices=("word", "letter"), default="word", help="answer with a word or an option letter"
    )
    gqa = parser.add_argument_group("from GQA")
    gqa.add_argument(
        "--gqa", type=Path, metavar="DIR", help="folder with questions/, images/ and, if any, sceneGraphs/"
    )
    gqa.add_argument("--per-image", type=int, default=4, help="most questions per picture (default: %(default)s)")
    gqa.add_argument("--seed", type=int, default=0, help="of the order of the pictures")
    gqa.add_argument("--instruction", default=None, metavar="TEXT", help="line after every question; '' for none")
    gqa.add_argument(
        "--exclude-ids", type=Path, nargs="+", default=[], metavar="FILE", help="image ids that must not be trained on"
    )
    gqa.add_argument(
        "--exclude-images",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="pictures that must not be trained on",
    )


def run(args: argparse.Namespace) -> Result:
    """Build the data set and describe it."""
    for name in (*SPLITS, "per_image"):
        if getattr(args, name) < (1 if name == "per_image" else 0):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; accepted are numbers from 0.")
    if not any(getattr(args, split) for split in SPLITS):
        raise ValueError(f"all of --{', --'.join(SPLITS)} are 0; ask for at least one row.")
    configs, left_out = _from_scenes(args) if args.source == "scenes" else _from_gqa(args)
    rows = sum(sum(splits.values()) for splits in configs.values())
    text = "\n".join(f"{name}: {', '.join(f'{s} {n}' for s, n in splits.items())}" for name, splits in configs.items())
    payload = {"out": str(args.out), "source": args.source, "rows": rows, "configs": configs, "left_out": left_out}
    return Result(payload, f"{text}\n{rows} rows in {args.out}")


def _from_scenes(args: argparse.Namespace) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    from dualstream.data_builders.shard_folder import ShardFolder

    from .rows import NON_SPATIAL_FEATURES, WHATS_UP_FEATURES, non_spatial_row, split_range, whats_up_rows

    sizes = {split: getattr(args, split) for split in SPLITS}
    settings = {"source": "scenes", **sizes, "size": args.size, "form": args.form}
    for split, count in sizes.items():
        split_range(split, 0, count)
    folder = ShardFolder(args.out, settings)
    configs: dict[str, dict[str, int]] = {name: {} for name in CONFIGS}
    for split, count in sizes.items():

        def sets(start: int, stop: int, split: str = split) -> Any:
            return chain.from_iterable(
                whats_up_rows(seed, args.size, args.form) for seed in split_range(split, start, stop)
            )

        def others(start: int, stop: int, split: str = split) -> Any:
            return (non_spatial_row(seed, args.size) for seed in split_range(split, start, stop))

        units = SHARD_UNITS["scenes"]
        configs["spatial"][split] = folder.write("spatial", split, count, sets, WHATS_UP_FEATURES, units)
        configs["non_spatial"][split] = folder.write("non_spatial", split, count, others, NON_SPATIAL_FEATURES, units)
    _finish(folder, "scenes", configs, settings, {})
    return configs, {}


def _from_gqa(args: argparse.Namespace) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    from dualstream.data_builders.shard_folder import ShardFolder

    from .gqa import INSTRUCTION, GqaFolder, gqa_rows, select
    from .held_out import HeldOut, images_under, read_ids
    from .rows import GQA_FEATURES

    if args.gqa is None:
        raise ValueError("--source gqa needs --gqa DIR, the folder with questions/ and images/.")
    source = GqaFolder(args.gqa)
    ids = source.test_ids().union(*(read_ids(path) for path in args.exclude_ids))
    files = [path for folder in args.exclude_images for path in images_under(folder)]
    sizes = {split: getattr(args, split) for split in SPLITS}
    instruction = INSTRUCTION if args.instruction is None else args.instruction
    excluded = hashlib.sha256("\n".join([*sorted(ids), *(path.name for path in files)]).encode()).hexdigest()
    settings = {"source": "gqa", **sizes, "per_image": args.per_image, "seed": args.seed}
    settings |= {
        "instruction": instruction,
        "held_out_ids": len(ids),
        "held_out_images": len(files),
        "excluded": excluded,
    }
    folder = ShardFolder(args.out, settings)
    held_out, graphs = HeldOut(ids, files), source.scene_graphs()
    configs: dict[str, dict[str, int]] = {}
    left_out: dict[str, Any] = {}
    for name in CONFIGS:
        chosen = select(source, held_out, sizes, spatial=name == "spatial", per_image=args.per_image, seed=args.seed)
        left_out[name] = dict(chosen.left_out)
        configs[name] = {}
        for split in SPLITS:
            questions = chosen.splits[split]

            def rows(start: int, stop: int, questions: Any = questions, hashes: Any = chosen.hashes) -> Any:
                return gqa_rows(source, questions[start:stop], hashes, graphs, instruction)

            configs[name][split] = folder.write(name, split, len(questions), rows, GQA_FEATURES, SHARD_UNITS["gqa"])
    _finish(folder, "gqa", configs, settings, left_out)
    return configs, left_out


def _finish(folder: Any, source: str, configs: dict, settings: dict[str, Any], left_out: dict[str, Any]) -> None:
    from .card import card

    (folder.folder / "README.md").write_text(card(source, configs, settings, left_out), encoding="utf-8")
    folder.save(rows=configs, left_out=left_out)
