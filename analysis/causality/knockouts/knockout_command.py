"""``dualstream analyze knockout``: on which routes and in which layers the answer travels, by cutting attention."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, open_model

from ..experiment import add_run_arguments, choose_pictures, identity, parts, run_missing, settings_of, write_results

if TYPE_CHECKING:
    from ..ablations.ablation import Picture
    from .knockout_rows import KnockoutPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    add_run_arguments(parser, ("vqa", "polling"))
    parser.add_argument(
        "--routes",
        default="all",
        metavar="ROUTE;...",
        help="all, paper (the six of arXiv 2410.07149), or SOURCES->DESTINATIONS, several between semicolons, e.g. "
        "'object+1->question,last;visual->last' (default: %(default)s)",
    )
    parser.add_argument(
        "--windows",
        default="paper",
        help="layers: paper (scaled to the model), single, width:W, all, FIRST-LAST (default: %(default)s)",
    )
    parser.add_argument("--each-head", action="store_true", help="also cut every head by itself in every window")
    parser.add_argument(
        "--further-limit",
        type=int,
        metavar="N",
        help="pictures asked in the second and further settings (default: all)",
    )


def run(args: argparse.Namespace) -> Result:
    """Run what is missing, then write tables, figures and report from the rows."""
    from dualstream.analysis.resumable_rows import ResumableRows

    from .knockout import knockout_support
    from .knockout_report import format_report, summarize, write_files
    from .knockout_rows import knockout_picture

    started = time.time()
    model, processor = open_model(args)
    plan, support = plan_of(args), knockout_support(model)
    if support.problem:
        raise ValueError(support.problem)
    pictures, selection = choose_pictures(args, processor)
    facts = identity(args, model, "analyze knockout")
    rows = ResumableRows(args.out, {**facts, "plan": asdict(plan), "further_limit": args.further_limit})
    units, plans = _units(pictures, plan, args.further_limit)

    def work(part: Sequence[Picture]) -> list[dict[str, Any]]:
        found = []
        for number, picture in enumerate(part):  # the probe looks at the first picture of every unit
            own, _ = knockout_picture(model, processor, picture, plans[id(part)], verify=number == 0)
            found += own
        return found

    run_missing(rows, units, work)
    table = rows.table(list(units))
    summary = {
        "plan": asdict(plan),
        "support": support.to_dict(),
        "probe": _probe(model, processor, pictures[0], plan),
        "funnel": selection.funnel,
        **summarize(table, args.seed),
    }
    return write_results(args, facts, started, summary, write_files, format_report)


def plan_of(args: argparse.Namespace) -> KnockoutPlan:
    """The plan that the options describe.

    Raises:
        ValueError: an option is wrong.
    """
    from .knockout_rows import KnockoutPlan
    from .routes import PAPER_ROUTES, ROUTES

    settings = settings_of(args)
    routes = {"all": ROUTES, "paper": PAPER_ROUTES}.get(args.routes)
    if routes is None:
        routes = tuple(route.strip() for route in args.routes.split(";") if route.strip())
    return KnockoutPlan(settings, routes, args.windows, args.each_head, seed=args.seed)


def _units(
    pictures: list[Picture], plan: KnockoutPlan, further: int | None
) -> tuple[dict[str, Sequence[Picture]], dict[int, KnockoutPlan]]:
    """Pictures that run together, and the plan of each such list: the first setting for all, others for some."""
    from dataclasses import replace

    units: dict[str, Sequence[Picture]] = {}
    plans = {}
    for number, setting in enumerate(plan.settings):
        end = len(pictures) if number == 0 or further is None else min(further, len(pictures))
        for start, part in parts(pictures, 0, end):
            units[f"{setting} {start}"] = part
            plans[id(part)] = replace(plan, settings=(setting,))
    return units, plans


def _probe(model: Any, processor: Any, picture: Picture, plan: KnockoutPlan) -> dict[str, Any]:
    """What the probe measures on one picture: the largest weight on a cut edge, and what those weights were before."""
    from .knockout_rows import knockout_picture

    _, reports = knockout_picture(model, processor, picture, plan)
    return {
        "largest_blocked_weight": max(report.largest_blocked_weight for report in reports),
        "largest_sum_error": max(report.largest_sum_error for report in reports),
        "layers": sorted({layer for report in reports for layer in report.layers}),
        "smallest_weight_before": min(w for report in reports for w in report.weight_before.values()),
    }
