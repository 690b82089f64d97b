"""``dualstream quiz``: accuracy on held-out scene questions, all visual tokens against every compression.

Each question belongs to a scene of its own, so questions are independent units and arms are compared pairwise on the
same ones. The control answers every question from the next scene's picture: what it scores needs no picture at all.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.cli import Result, add_model_arguments, model_facts, open_model

from .manifest import make_manifest, write_json
from .statistics import bootstrap_mean, paired_difference, proportion

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from dualstream.modeling import VisualDecoder

# A caption has no single right answer, so captions are not scored by exact match.
SCORED_KINDS = ("presence", "attribute", "count", "where", "relation", "direction")
FULL, CONTROL = "full", "other picture"
DEFAULT_METHODS = ("rle", "rle_drop_top1", "rle_drop_top2")


@dataclass(frozen=True)
class Item:
    """One held-out question with its picture."""

    seed: int
    kind: str
    question: str
    truth: str
    image: Image


@dataclass(frozen=True)
class Arm:
    """One way to answer all items.

    Attributes:
        name: as it stands in the rows.
        compression: a compression method, None for the full prompt.
        images: pictures to answer from, one per item; None: each item's own.
        decoder_for: (first, end) -> visual decoder that compresses the items of this range; None: the model's own.
    """

    name: str
    compression: str | None = None
    images: list[Image] | None = None
    decoder_for: Callable[[int, int], VisualDecoder] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("-n", "--questions", type=int, default=1000, help="number of questions (default: %(default)s)")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="default: %(default)s")
    parser.add_argument(
        "--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help="compressions to compare"
    )
    parser.add_argument("--image-size", type=int, default=224, help="shorter side in pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes and questions")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write answers.parquet and summary.json")


def run(args: argparse.Namespace) -> Result:
    """Measure, print a table and write the files asked for."""
    started = time.time()
    model, processor = open_model(args)
    items = draw_items(args.questions, args.split, args.seed, args.image_size)
    rows = answer_items(model, processor, items, args.methods, args.batch_size)
    summary = summarize(rows)
    facts = model_facts(args.model, model)
    manifest = make_manifest(args.seed, started, **facts, split=args.split, questions=args.questions)
    payload = {"summary": summary, "manifest": manifest}
    if args.out:
        from datasets import Dataset

        args.out.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(args.out / "answers.parquet")
        write_json(args.out / "summary.json", payload)
    return Result(payload, format_table(summary))


def draw_items(n: int, split: str = "test", seed: int = 0, image_size: int = 224) -> list[Item]:
    """Draw ``n`` questions, each on its own scene, kinds in turn.

    Raises:
        ValueError: ``n`` is not positive.
    """
    from dualstream.data_builders.scenes import SPLIT_SEEDS, ask, make_scene, render

    if n < 1:
        raise ValueError(f"questions must be at least 1, got {n}.")
    rng = random.Random(f"{split}-{seed}")
    items: list[Item] = []
    while len(items) < n:
        scene_seed = rng.choice(SPLIT_SEEDS[split])
        scene = make_scene(scene_seed)
        kind = SCORED_KINDS[len(items) % len(SCORED_KINDS)]
        question = ask(scene, kind, rng)
        if question is not None:
            items.append(Item(scene_seed, kind, question.text, question.answer, render(scene, image_size)))
    return items


def normalize(answer: str) -> str:
    """Lower-case, drop a leading article and outer punctuation, squeeze blanks."""
    words = re.sub(r"\s+", " ", answer.lower()).strip(" .,!?'\"")
    return re.sub(r"^(a|an|the) ", "", words)


def answer_items(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: list[Item],
    methods: Iterable[str] = DEFAULT_METHODS,
    batch_size: int = 50,
) -> list[dict[str, Any]]:
    """Answer every item under every arm.

    Args:
        model: a supported VLM.
        processor: its processor.
        items: the questions.
        methods: compressions; the full prompt and the control are added.
        batch_size: questions per ``generate`` call.

    Returns:
        One row per item and arm, see ``answer_arm``.
    """
    shifted = [item.image for item in items[1:] + items[:1]]
    arms = [
        Arm(name, None if name in (FULL, CONTROL) else name, shifted if name == CONTROL else None)
        for name in (FULL, *methods, CONTROL)
    ]
    return answer_arms(model, processor, items, arms, batch_size)


def answer_arms(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[Item], arms: list[Arm], batch_size: int = 50
) -> list[dict[str, Any]]:
    """Answer every item in several ways, with a bar; see ``answer_arm``."""
    from tqdm import tqdm

    rows = chain.from_iterable(answer_arm(model, processor, items, arm, batch_size) for arm in arms)
    return list(tqdm(rows, total=len(arms) * len(items), desc="questions", unit="q", disable=None))


def answer_arm(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[Item], arm: Arm, batch_size: int = 50
) -> Iterator[dict[str, Any]]:
    """Answer every item in one way.

    Args:
        model: a supported VLM.
        processor: its processor.
        items: the questions.
        arm: the way.
        batch_size: questions per ``generate`` call.

    Yields:
        One row per item: seed, kind, question, truth, arm, answer, correct, visual_tokens, kept_tokens.
    """
    from dualstream.processing import answer_questions

    images = [item.image for item in items] if arm.images is None else arm.images
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        answers = answer_questions(
            model,
            processor,
            images[start : start + batch_size],
            [item.question for item in batch],
            compression=arm.compression,
            decoder=None if arm.decoder_for is None else arm.decoder_for(start, start + len(batch)),
            max_new_tokens=8,
        )
        for item, answer in zip(batch, answers, strict=True):
            yield {
                "seed": item.seed,
                "kind": item.kind,
                "question": item.question,
                "truth": item.truth,
                "arm": arm.name,
                "answer": answer.text,
                "correct": normalize(answer.text) == normalize(item.truth),
                "visual_tokens": answer.visual_tokens,
                "kept_tokens": answer.kept_tokens,
            }


def summarize(rows: list[dict[str, Any]], references: Iterable[str] = (FULL,)) -> list[dict[str, Any]]:
    """Accuracy by arm and kind, paired differences, reduction rate; each with n and a 95 % interval.

    Args:
        rows: of ``answer_items``, the same items in every arm.
        references: arms that all others are compared with, as ``difference_to_<arm>``.

    Returns:
        One object per arm, in the order of appearance.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    correct_of = {arm: np.array([row["correct"] for row in by_arm[arm]]) for arm in arms}
    references = list(references)
    summary = []
    for arm in arms:
        correct = correct_of[arm]
        kinds = np.array([row["kind"] for row in by_arm[arm]])
        reduction = np.array([1 - row["kept_tokens"] / row["visual_tokens"] for row in by_arm[arm]])
        summary.append(
            {
                "arm": arm,
                "accuracy": proportion(correct).to_dict(),
                "accuracy_by_kind": {
                    kind: proportion(correct[kinds == kind]).to_dict() for kind in dict.fromkeys(kinds.tolist())
                },
                **{
                    f"difference_to_{reference}": None
                    if arm == reference
                    else paired_difference(correct, correct_of[reference]).to_dict()
                    for reference in references
                },
                "reduction_rate": bootstrap_mean(reduction).to_dict(),
            }
        )
    return summary


def format_table(summary: list[dict[str, Any]]) -> str:
    """The summary as aligned text, in percent and percentage points with 95 % intervals."""
    n = summary[0]["accuracy"]["n"]
    lines = [
        f"{n} held-out questions, one per scene; 95 % intervals in brackets",
        f"{'prompt':<16}{'accuracy %':>22}{'difference to full':>26}{'fewer tokens %':>24}",
    ]
    for row in summary_cells(summary):
        lines.append(f"{row['name']:<16}{row['accuracy']:>22}{row['difference']:>26}{row['reduction']:>24}")
    return "\n".join(lines)


def summary_cells(summary: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The summary as formatted table cells."""
    from .statistics import Estimate

    def cell(estimate: dict[str, Any] | None, signed: bool = False) -> str:
        return "" if estimate is None else Estimate(**estimate).percent(signed=signed)

    return [
        {
            "name": row["arm"],
            "accuracy": cell(row["accuracy"]),
            "difference": cell(row["difference_to_full"], signed=True),
            "reduction": cell(row["reduction_rate"]) if row["reduction_rate"]["high"] > 0 else "0",
        }
        for row in summary
    ]
