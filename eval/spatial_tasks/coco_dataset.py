"""``dualstream build coco-spatial``: the COCO questions of What's Up as a typed dataset."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result

if TYPE_CHECKING:
    from .items import Item

TASKS = {"one": "coco_spatial_one", "two": "coco_spatial_two"}
SPLIT, SHARD_ROWS = "test", 500
COLUMNS = {
    "item_id": "the item's id, in the order of the published file",
    "image_id": "file name of the picture in COCO val2017; empty where only the published questions are known",
    "image": "the picture, byte for byte as published",
    "options": "a true description and its opposite, the true one first",
    "relation": "what the true description says",
    "opposite": "what the other one says",
}
PROVENANCE = (
    'Descriptions: *What\'s "up" with vision-language models?* (arXiv 2310.19785) on COCO val2017. Their licences are '
    "theirs; pictures are only embedded where the builder was given them."
)
REWRITTEN = " The descriptions are written anew from the published questions, which do not name the pictures."
LIMITS = (
    "The true option stands first in every row: shuffle before asking, or a model that always says A is always right.",
    "The relations are not balanced; accuracy needs the constant answer beside it.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="data folder in the layout of docs/spatial_tasks.md"
    )
    parser.add_argument("--embed-images", action="store_true", help="put the pictures into the dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the dataset")


def run(args: argparse.Namespace) -> Result:
    """Read the annotations, check their counts, and write Parquet and card."""
    from dualstream.data_builders.dataset_card import CardText, dataset_card
    from dualstream.data_builders.shard_folder import ShardFolder

    from .data_folder import data_root, find

    root = data_root(args.data)
    found = {config: find(task, root) for config, task in TASKS.items()}
    items = {config: _read(task, found[config]) for config, task in TASKS.items()}
    folders: dict[str, Path | None] = dict.fromkeys(TASKS)
    if args.embed_images:
        folders |= {config: _pictures(task, items[config], found[config].images) for config, task in TASKS.items()}
    features = {config: _features(items[config], args.embed_images) for config in TASKS}
    hashes = {config: _sha256(found[config].annotations) for config in TASKS}
    folder = ShardFolder(args.out, {"annotations": hashes, "embed_images": args.embed_images})
    rows: dict[str, dict[str, int]] = {}
    for config, one in items.items():

        def made(start: int, stop: int, one: Any = one, pictures: Any = folders[config]) -> list[dict[str, Any]]:
            return [_row(item, pictures) for item in one[start:stop]]

        rows[config] = {SPLIT: folder.write(config, SPLIT, len(one), made, features[config], SHARD_ROWS)}
    official = all(one.official for one in found.values())
    text = CardText(
        title="COCO spatial",
        summary="Photographs with a true description of where things are and its opposite: `one` is about the place "
        "of one object in the picture, `two` about two objects.",
        provenance=PROVENANCE + ("" if official else REWRITTEN),
        license="other",
        tags=("spatial", "coco", "whats-up"),
        limits=LIMITS,
        sections={"Relations": _relation_table(items)},
    )
    columns = {name: meaning for name, meaning in COLUMNS.items() if name in features["one"]}
    command = "dualstream build coco-spatial --data DIR" + (" --embed-images" if args.embed_images else "")
    (args.out / "README.md").write_text(dataset_card(text, rows, features, columns, command), encoding="utf-8")
    folder.save(rows=rows)
    counts = ", ".join(f"{config} {splits[SPLIT]}" for config, splits in rows.items())
    return Result({"out": str(args.out), "rows": rows, "official": official}, f"{counts} rows in {args.out}")


def _read(task: str, found: Any) -> list[Item]:
    from .whats_up import read_annotations, read_prompts

    return (read_annotations if found.official else read_prompts)(task, found.annotations)


def _pictures(task: str, items: Sequence[Item], folder: Path | None) -> Path:
    """The picture folder, with every picture in it.

    Raises:
        MissingDataError: pictures are missing, or the annotations do not name them.
    """
    from .docs import require_pictures

    require_pictures(task, items, folder)
    assert folder is not None
    return folder


def _sha256(path: Path) -> str:
    from dualstream.data_builders.token_maps.shards import file_sha256

    return file_sha256(path)


def _features(items: Sequence[Item], embed_images: bool) -> Any:
    from datasets import ClassLabel, Features, Image, List, Value

    relations = sorted({relation for item in items for relation in item.relations})
    columns: dict[str, Any] = {
        "item_id": Value("string"),
        "image_id": Value("string"),
        "image": Image(),
        "options": List(Value("string"), length=2),
        "relation": ClassLabel(names=relations),
        "opposite": ClassLabel(names=relations),
    }
    return Features({name: feature for name, feature in columns.items() if embed_images or name != "image"})


def _row(item: Item, pictures: Path | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "item_id": item.id,
        "image_id": item.image.rsplit(".", 1)[0],
        "options": list(item.options),
        "relation": item.relations[0],
        "opposite": item.relations[1],
    }
    if pictures is not None:
        row["image"] = {"bytes": (pictures / item.image).read_bytes(), "path": item.image}
    return row


def _relation_table(items: dict[str, list[Item]]) -> str:
    lines = ["| configuration | relation | rows |", "|---|---|---|"]
    for config, one in items.items():
        lines += [
            f"| `{config}` | {name} | {n} |" for name, n in Counter(item.relations[0] for item in one).most_common()
        ]
    return "\n".join(lines)
