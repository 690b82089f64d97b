"""``dualstream analyze ablate``: which visual tokens carry the answer, by replacing them, with matched controls."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, open_model

from ..experiment import (
    add_run_arguments,
    choose_pictures,
    identity,
    names,
    parts,
    run_missing,
    settings_of,
    write_results,
)

if TYPE_CHECKING:
    from .ablation import AblationPlan, Picture
    from .replacement import Reference

REFERENCE_LIMIT = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_run_arguments(parser, ("generative", "polling", "vqa"))
    parser.add_argument(
        "--reference",
        metavar="DATA",
        help="pictures that replacements come from (default: 200 of the data's validation split)",
    )
    parser.add_argument(
        "--mean", metavar="FILE", help="a mean vector of your own: tensor 'mean' of a safetensors file (single layer)"
    )
    parser.add_argument(
        "--arms",
        default="mean",
        metavar="ARM,...",
        help="replacements mean, position-mean, zero, resample, other-image; with @K after K blocks of the language "
        "model instead of before it, or @all at every depth. The first one runs every condition, further ones the "
        "main conditions (default: %(default)s)",
    )
    parser.add_argument(
        "--further-limit",
        type=int,
        metavar="N",
        help="pictures that also run further arms, attribution and sets of fixed sizes (default: all)",
    )
    parser.add_argument(
        "--counts", default="5,10,20,40", help="sizes of random and attribution sets (default: %(default)s)"
    )
    parser.add_argument("--draws", type=int, default=2, help="draws of the matched controls (default: %(default)s)")
    parser.add_argument(
        "--ig-steps", type=int, default=8, help="points of integrated gradients; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="length of a description (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="rows of one batch (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Run what is missing, then write tables, figures and report from the rows."""
    from dualstream.analysis.resumable_rows import ResumableRows
    from dualstream.modeling.families import family_of

    from .ablate_report import format_report, summarize, write_files
    from .ablation import ablate_targets

    started = time.time()
    model, processor = open_model(args)
    plan = plan_of(args, len(family_of(model).llm_blocks(model)))
    pictures, selection = choose_pictures(args, processor)
    further = len(pictures) if args.further_limit is None else min(args.further_limit, len(pictures))
    facts = identity(args, model, "analyze ablate")
    reference_name = args.reference or _reference_name(args.data)
    options = {"reference": reference_name.split("/")[-1], "mean": args.mean and str(args.mean).split("/")[-1]}
    rows = ResumableRows(args.out, {**facts, **options, "further_limit": args.further_limit, "plan": asdict(plan)})
    units = _units(pictures, further)
    if any(name not in rows for name in units):
        reference = open_reference(model, processor, reference_name, plan, args.mean)
        core = replace(plan, arms=plan.arms[:1], ig_steps=0, counts=())
        plans = {id(part): plan if name.startswith("whole") else core for name, part in units.items()}

        def work(part: Sequence[Picture]) -> list[dict[str, Any]]:
            return ablate_targets(model, processor, part, plans[id(part)], reference)

        run_missing(rows, units, work)
    table = rows.table(list(units))
    summary = {"plan": asdict(plan), "funnel": selection.funnel, **summarize(table, args.seed)}
    return write_results(args, facts | options, started, summary, write_files, format_report)


def plan_of(args: argparse.Namespace, layers: int) -> AblationPlan:
    """The plan that the options describe.

    Raises:
        ValueError: an option is wrong.
    """
    from .ablation import AblationPlan

    if not all(word.isdecimal() and int(word) > 0 for word in names(args.counts)):
        raise ValueError(f"counts={args.counts!r} must be numbers of tokens between commas, e.g. 5,10,20.")
    return AblationPlan(
        settings=settings_of(args),
        counts=tuple(int(word) for word in names(args.counts)),
        draws=args.draws,
        coverage=args.coverage,
        ig_steps=args.ig_steps,
        arms=arms_of(args.arms, layers),
        max_new_tokens=args.max_new_tokens,
        rows_per_pass=args.batch_size,
        seed=args.seed,
    )


def arms_of(text: str, layers: int) -> tuple[Any, ...]:
    """Read ``mean,zero,mean@2,mean@all``.

    Raises:
        ValueError: an arm is unknown, or a depth lies outside the model.
    """
    from .ablation import CONNECTOR, Arm

    found = []
    for word in names(text):
        kind, at, depth = word.partition("@")
        if not at:
            found.append(Arm(kind, CONNECTOR))
        elif depth == "all":
            found += [Arm(kind, number) for number in range(1, layers + 1)]
        elif depth.isdecimal() and int(depth) <= layers:
            found.append(Arm(kind, int(depth)))
        else:
            raise ValueError(f"arm={word!r}: the depth must be 0..{layers} or all.")
    return tuple(dict.fromkeys(found))


def open_reference(model: Any, processor: Any, name: str, plan: AblationPlan, mean: str | None = None) -> Reference:
    """Collect the replacement values of a plan, or take a given mean vector.

    Raises:
        ValueError: there are no reference pictures, or the vector does not fit the model.
    """
    from dualstream.analysis.annotated_images import open_annotated

    from .replacement import collect_reference, take_mean

    images = open_annotated(name, REFERENCE_LIMIT, "validation", plan.seed)
    reference = collect_reference(model, processor, images, plan.depths, plan.seed)
    if mean is not None:
        take_mean(reference, mean)
    return reference


def _reference_name(data: str) -> str:
    """The data's own validation split."""
    kind, _, rest = str(data).partition(":")
    if kind != "scenes":
        return str(data)
    pixels = rest.split(":")[2:] if rest else []
    return ":".join(["scenes", "validation", str(REFERENCE_LIMIT), *pixels])


def _units(pictures: list[Picture], further: int) -> dict[str, Sequence[Picture]]:
    """Pictures that run together; those that run the whole plan come first, the others its main conditions."""
    units: dict[str, Sequence[Picture]] = {}
    for kind, begin, end in (("whole", 0, further), ("core", further, len(pictures))):
        units |= {f"{kind} {start}": part for start, part in parts(pictures, begin, end)}
    return units
