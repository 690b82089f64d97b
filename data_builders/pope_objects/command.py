"""``dualstream build pope-objects``: the objects POPE asks about, per question and per picture."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result

if TYPE_CHECKING:
    from datasets import Features

SETTINGS = ("random", "popular", "adversarial")
OBJECTS, SPLIT, SHARD_ROWS = "objects", "test", 5000
QUESTION = re.compile(r"Is there (?:a|an) (.+) in the image\?")
FORM = '{"question_id": NUMBER, "image": FILE, "text": "Is there a NAME in the image?", "label": "yes" or "no"}'
COLUMNS = {
    "question_id": "POPE's number of the question inside its setting",
    "image_id": "file name of the picture in COCO, without its ending",
    "object": "what is asked about",
    "question": "as POPE words it",
    "answer": "whether it is there, by COCO's instance annotations",
    "present": "objects that POPE says are there, over all settings, sorted",
    "absent": "objects that POPE says are not there, likewise",
}
PROVENANCE = (
    "Questions: *Evaluating Object Hallucination in Large Vision-Language Models* (arXiv 2305.10355) on COCO val2014. "
    "Their licences are theirs; the pictures are not included."
)
LIMITS = (
    "Truth is COCO's instance annotation: an object that nobody outlined counts as absent.",
    "Half of the answers are yes. A model that always says yes is right in half of them.",
)


@dataclass(frozen=True)
class Asked:
    """One question."""

    number: int
    image: str
    name: str
    text: str
    present: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    for setting in SETTINGS:
        parser.add_argument(
            f"--{setting}", type=Path, metavar="FILE", help=f"POPE's {setting} questions, one JSON object per line"
        )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the dataset")


def run(args: argparse.Namespace) -> Result:
    """Read the settings that were given, check them against each other, and write Parquet and card."""
    from dualstream.data_builders.dataset_card import CardText, dataset_card
    from dualstream.data_builders.shard_folder import ShardFolder
    from dualstream.data_builders.token_maps.shards import file_sha256

    given = {setting: getattr(args, setting) for setting in SETTINGS if getattr(args, setting) is not None}
    if not given:
        raise ValueError(f"give at least one of --{', --'.join(SETTINGS)}.")
    asked = {setting: read_questions(path) for setting, path in given.items()}
    pictures = by_picture(asked)
    features = _features()
    folder = ShardFolder(args.out, {setting: file_sha256(path) for setting, path in given.items()})
    rows: dict[str, dict[str, int]] = {}
    for config, count, made in [
        *((setting, len(questions), [_question_row(q) for q in questions]) for setting, questions in asked.items()),
        (OBJECTS, len(pictures), pictures),
    ]:

        def part(start: int, stop: int, made: list[dict[str, Any]] = made) -> list[dict[str, Any]]:
            return made[start:stop]

        rows[config] = {SPLIT: folder.write(config, SPLIT, count, part, features[config], SHARD_ROWS)}
    text = CardText(
        title="POPE objects",
        summary=f"Yes/no questions about objects in {len(pictures)} pictures, one configuration per setting of POPE, "
        f"and one row per picture with all its objects in `{OBJECTS}`.",
        provenance=PROVENANCE,
        license="other",
        tags=("hallucination", "pope", "coco"),
        limits=LIMITS,
        sections={"Answers": _answer_table(asked)},
    )
    shown = {name: features[name] for name in rows}
    command = "dualstream build pope-objects " + " ".join(f"--{s} {path.name}" for s, path in given.items())
    (args.out / "README.md").write_text(dataset_card(text, rows, shown, COLUMNS, command), encoding="utf-8")
    folder.save(rows=rows)
    counts = ", ".join(f"{config} {splits[SPLIT]}" for config, splits in rows.items())
    return Result({"out": str(args.out), "rows": rows}, f"{counts} rows in {args.out}")


def read_questions(path: Path) -> list[Asked]:
    """Read one setting.

    Raises:
        ValueError: a line is cut short or of another form, or a number occurs twice.
    """
    questions: dict[int, Asked] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                match = QUESTION.fullmatch(row["text"].strip())
                if match is None or row["label"] not in ("yes", "no"):
                    raise ValueError(f"{row['text']!r}, {row['label']!r}")
                image = row["image"].rsplit(".", 1)[0]
                asked = Asked(int(row["question_id"]), image, match[1], row["text"].strip(), row["label"] == "yes")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path.name}, line {number}: not {FORM}: {error}") from error
            if asked.number in questions:
                raise ValueError(f"{path.name}, line {number}: question_id {asked.number} occurs twice.")
            questions[asked.number] = asked
    if not questions:
        raise ValueError(f"{path.name} holds no question.")
    return list(questions.values())


def by_picture(asked: Mapping[str, Sequence[Asked]]) -> list[dict[str, Any]]:
    """Rows of the pictures with their objects.

    Raises:
        ValueError: two questions about the same object in the same picture have different answers.
    """
    truths: dict[str, dict[str, bool]] = defaultdict(dict)
    for setting, questions in asked.items():
        for question in questions:
            if truths[question.image].setdefault(question.name, question.present) != question.present:
                raise ValueError(
                    f"{setting}, question {question.number}: {question.name!r} in {question.image} is there in one "
                    "question and not in another."
                )
    return [
        {
            "image_id": image,
            "present": sorted(name for name, there in names.items() if there),
            "absent": sorted(name for name, there in names.items() if not there),
        }
        for image, names in sorted(truths.items())
    ]


def _question_row(asked: Asked) -> dict[str, Any]:
    return {
        "question_id": asked.number,
        "image_id": asked.image,
        "object": asked.name,
        "question": asked.text,
        "answer": "yes" if asked.present else "no",
    }


def _features() -> dict[str, Features]:
    from datasets import ClassLabel, Features, List, Value

    questions = Features(
        {
            "question_id": Value("int32"),
            "image_id": Value("string"),
            "object": Value("string"),
            "question": Value("string"),
            "answer": ClassLabel(names=["no", "yes"]),
        }
    )
    names = List(Value("string"))
    objects = Features({"image_id": Value("string"), "present": names, "absent": names})
    return {**dict.fromkeys(SETTINGS, questions), OBJECTS: objects}


def _answer_table(asked: Mapping[str, Sequence[Asked]]) -> str:
    lines = ["| setting | yes | no | pictures | different objects |", "|---|---|---|---|---|"]
    for setting, questions in asked.items():
        counts = Counter(question.present for question in questions)
        pictures, names = ({getattr(q, field) for q in questions} for field in ("image", "name"))
        lines.append(f"| {setting} | {counts[True]} | {counts[False]} | {len(pictures)} | {len(names)} |")
    return "\n".join(lines)
