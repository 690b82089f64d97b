"""``dualstream build whatsup-bboxes``: the boxes of the What's Up pictures as a dataset that others can load."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result

if TYPE_CHECKING:
    from .consistency import Finding, Picture

CONFIG, SPLIT, FINDINGS = "default", "test", "findings.json"
SHARD_ROWS = 100
LIMITS = (
    "The boxes were drawn by hand by others than the pictures' authors; how far two annotators agree is not known.",
    "Some 100 sets of few objects in one room: differences between methods need intervals over the sets.",
    "All of it is a test set. Choose nothing on it.",
)
PROVENANCE = (
    'Pictures and relations: *What\'s "up" with vision-language models?* (arXiv 2310.19785). '
    "Boxes: the annotations published with *Reading Images Like Texts* (arXiv 2509.19191). Their licences are theirs; "
    "pictures are only embedded where the builder was given them."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="one line of boxes per picture, as published")
    parser.add_argument("--voc-xml", type=Path, metavar="DIR", help="folder of Pascal-VOC files, one per picture")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the pictures, to embed them (default: boxes only)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the dataset")


def run(args: argparse.Namespace) -> Result:
    """Check the sources, write Parquet, card and findings, and report what disagreed."""
    from dualstream.data_builders.dataset_card import dataset_card
    from dualstream.data_builders.shard_folder import ShardFolder
    from dualstream.data_builders.token_maps.atomic import write_json

    from .annotations import read_jsonl, read_voc_folder
    from .consistency import unify
    from .rows import COLUMNS, find_images, make_features, make_row

    if args.jsonl is None and args.voc_xml is None:
        raise ValueError("give --jsonl FILE, --voc-xml DIR, or both to check one against the other.")
    pictures, findings = unify(
        None if args.jsonl is None else read_jsonl(args.jsonl),
        None if args.voc_xml is None else read_voc_folder(args.voc_xml),
    )
    if not pictures:
        raise ValueError("the annotations hold no picture.")
    files = None if args.images is None else find_images(pictures, args.images)
    features = make_features(pictures, files is not None)
    folder = ShardFolder(args.out, _settings(args, files))

    def rows(start: int, stop: int) -> list[dict[str, Any]]:
        return [make_row(p, None if files is None else files[p.stem]) for p in pictures[start:stop]]

    count = folder.write(CONFIG, SPLIT, len(pictures), rows, features, SHARD_ROWS)
    write_json(args.out / FINDINGS, [finding.to_dict() for finding in findings])
    columns = {name: meaning for name, meaning in COLUMNS.items() if name in features}
    card = dataset_card(
        _card_text(pictures, findings, args), {CONFIG: {SPLIT: count}}, {CONFIG: features}, columns, _command(args)
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    folder.save(rows={CONFIG: {SPLIT: count}}, **_counts(pictures))
    payload = {"out": str(args.out), "rows": count, **_counts(pictures), "findings": [f.to_dict() for f in findings]}
    return Result(payload, _summary(payload, findings))


def _settings(args: argparse.Namespace, files: dict[str, Path] | None) -> dict[str, Any]:
    """What the rows depend on, by content: the same sources elsewhere are the same build."""
    from dualstream.data_builders.token_maps.shards import file_sha256

    voc = [] if args.voc_xml is None else sorted(args.voc_xml.glob("*.xml"))
    return {
        "jsonl": None if args.jsonl is None else file_sha256(args.jsonl),
        "voc_xml": _joint_hash(voc),
        "images": None if files is None else _joint_hash(list(files.values())),
    }


def _joint_hash(files: Sequence[Path]) -> str | None:
    """SHA-256 over the names and contents of files; None for no file."""
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _counts(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Complete sets and pairs, and pictures per relation."""
    sets = Counter(picture.parsed.set_id for picture in pictures)
    pairs = Counter(picture.parsed.pair_id for picture in pictures)
    return {
        "complete_sets": sum(number == 4 for number in sets.values()),
        "complete_pairs": sum(number == 2 for number in pairs.values()),
        "relations": dict(Counter(picture.parsed.relation for picture in pictures)),
    }


def _card_text(pictures: Sequence[Picture], findings: Sequence[Finding], args: argparse.Namespace) -> Any:
    from dualstream.data_builders.dataset_card import CardText

    from .consistency import RULES

    counts = _counts(pictures)
    relations = ", ".join(f"{name} {number}" for name, number in counts["relations"].items())
    sources = " and ".join(
        name for name, given in (("the JSON lines", args.jsonl), ("the Pascal-VOC files", args.voc_xml)) if given
    )
    rules = "\n".join(f"- *{kind}* ({sum(f.kind == kind for f in findings)}): {rule}" for kind, rule in RULES.items())
    listed = "\n".join(f"| `{f.image}` | {f.kind} | {f.source} | {f.detail} |" for f in findings)
    table = f"| picture | what | source | detail |\n|---|---|---|---|\n{listed}" if findings else "Nothing disagreed."
    intro = f"Read from {sources}. Rules, and how often each applied:"
    return CardText(
        title="What's Up with object boxes",
        summary=f"{len(pictures)} pictures of two objects each, with the box of either: {counts['complete_sets']} "
        f"complete sets of four relations, {counts['complete_pairs']} complete pairs ({relations}).",
        provenance=PROVENANCE,
        license="other",
        tags=("spatial", "bounding-boxes", "whats-up"),
        limits=LIMITS if args.images else (*LIMITS, "The pictures are not included; `image_id` names their files."),
        sections={"Consistency of the annotations": f"{intro}\n\n{rules}\n\n{table}"},
        task_categories=("visual-question-answering", "object-detection"),
    )


def _command(args: argparse.Namespace) -> str:
    given = (("--jsonl", args.jsonl), ("--voc-xml", args.voc_xml), ("--images", args.images))
    return " ".join(["dualstream build whatsup-bboxes", *(f"{flag} {path.name}" for flag, path in given if path)])


def _summary(payload: dict[str, Any], findings: Sequence[Finding]) -> str:
    lines = [f"{f.image}: {f.kind} ({f.source}): {f.detail}" for f in findings] or ["nothing disagreed"]
    relations = ", ".join(f"{name} {number}" for name, number in payload["relations"].items())
    lines.append(
        f"{payload['rows']} rows, {payload['complete_sets']} complete sets, {payload['complete_pairs']} complete "
        f"pairs ({relations}) in {payload['out']}"
    )
    return "\n".join(lines)
