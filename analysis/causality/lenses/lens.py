"""``dualstream analyze lens``: how often an object's cells read as its class, at which depth, against chance."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.cli import Result, add_model_arguments, model_facts, open_model

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, ProcessorMixin

    from dualstream.analysis.annotated_images import AnnotatedImage
    from dualstream.analysis.resumable_rows import ResumableRows

    from .lens_correspondence import ClassIds, ClassVocabulary

SUMMARY, REPORT, FIGURE, MANIFEST, SHARES = "summary.json", "report.md", "lens.png", "manifest.json", "shares.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    from dualstream.analysis.annotated_images import ACCEPTED, SPLITS

    add_model_arguments(parser)
    parser.add_argument("--data", default="scenes", help=f"pictures with objects: {ACCEPTED} (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="pictures at most")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows, summary, report and figure")
    parser.add_argument(
        "--min-coverage", type=float, default=0.5, help="share of a cell that the object covers (default: %(default)s)"
    )
    parser.add_argument(
        "--area",
        metavar="LEAST,MOST",
        help="square pixels of the object (arXiv 2410.07149: 20000,30000; default: any)",
    )
    parser.add_argument("--synonyms", type=Path, metavar="FILE", help="one class per line, its names between commas")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per pass (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, controls and folds (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Measure what is missing, then write summary, report and figure from the rows."""
    from dualstream.analysis.annotated_images import open_annotated
    from dualstream.analysis.resumable_rows import ResumableRows
    from dualstream.eval.manifest import make_manifest, write_json

    from ..experiment import cost_of, parse_area
    from ..targets import data_label, read_synonyms
    from .lens_correspondence import ClassVocabulary

    if not 0 <= args.min_coverage <= 1:
        raise ValueError(f"min_coverage must lie in 0..1, got {args.min_coverage}.")
    started = time.time()
    images = open_annotated(args.data, args.limit, args.split, args.seed)
    synonyms = read_synonyms(args.synonyms) if args.synonyms else {}
    model, processor = open_model(args)
    facts = model_facts(args.model, model)
    options: dict[str, Any] = {"data": data_label(args.data), "split": args.split, "min_coverage": args.min_coverage}
    options["area"] = area = parse_area(args.area)
    options["synonyms"] = args.synonyms.name if args.synonyms else None
    settings = {"command": "analyze lens", **facts, "dtype": str(model.dtype), **options, "seed": args.seed}
    rows = ResumableRows(args.out, settings)
    vocabulary = ClassVocabulary(processor.tokenizer, len(model.get_output_embeddings().weight), synonyms)
    measure(model, processor, images, vocabulary, rows, args.batch_size, args.min_coverage, args.seed, area)
    table = rows.table([image.name for image in images])
    summary = {**facts, **options, "seed": args.seed, **summarize(table, vocabulary, args.seed)}
    write_json(args.out / SUMMARY, summary)
    write_files(args.out, table, vocabulary, summary)
    manifest = make_manifest(args.seed, started, **facts, **options, pictures=len(images), cost=cost_of(args.out))
    write_json(args.out / MANIFEST, manifest)
    return Result({"summary": summary, "manifest": manifest}, format_report(summary))


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[AnnotatedImage],
    vocabulary: ClassVocabulary,
    rows: ResumableRows,
    batch_size: int = 16,
    min_coverage: float = 0.5,
    seed: int = 0,
    area: tuple[float, float] | None = None,
) -> None:
    """Write the rows of every picture that has none yet, see ``lens_rows``."""
    import pyarrow as pa
    from tqdm import tqdm

    from ..experiment import COST, add_cost
    from .lens_correspondence import SCHEMA, lens_rows

    missing = [image for image in images if image.name not in rows]
    with tqdm(total=len(images), initial=len(images) - len(missing), unit="picture", disable=None) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            cpu, wall = time.process_time(), time.time()
            found = lens_rows(model, processor, batch, vocabulary, min_coverage, seed, area)
            add_cost(rows.folder / COST, time.process_time() - cpu, time.time() - wall, len(batch))
            for image, own in zip(batch, found, strict=True):
                rows.write(image.name, pa.Table.from_pylist(own, schema=SCHEMA))
            bar.update(len(batch))


def summarize(table: pa.Table, vocabulary: ClassVocabulary, seed: int = 0) -> dict[str, Any]:
    """All figures of a run.

    Returns:
        ``accounting`` (pictures and objects, and what was left out why), one object per matching rule (see
        ``summarize_shares``), ``log_probability`` (see ``probabilities``).

    Raises:
        ValueError: no object has a cell.
    """
    from .lens_shares import RULES, probabilities, shares_of, summarize_shares

    first = table.filter(table.column("depth").to_numpy() == 0).to_pylist()
    if not any(row["objects"] for row in first):
        raise ValueError("the pictures have no objects; give a source with boxes or masks.")
    classes = class_table(table, vocabulary)
    objects = [(name, cells) for row in first for name, cells in zip(row["objects"], row["cells"], strict=True)]
    accounting = {
        "pictures": len(first),
        "pictures without an object": sum(not row["objects"] for row in first),
        "objects": len(objects),
        "objects that cover no cell as far as asked for": sum(not cells for _, cells in objects),
        "classes": len(classes),
        "classes without a whole-word entry": sorted(name for name, ids in classes.items() if not ids.whole),
        "classes without any entry": sorted(name for name, ids in classes.items() if not ids.piece),
    }
    return {
        "accounting": accounting,
        **{rule: summarize_shares(shares_of(table, classes, rule, seed), seed) for rule in RULES},
        "log_probability": probabilities(table),
    }


def class_table(table: pa.Table, vocabulary: ClassVocabulary) -> dict[str, ClassIds]:
    """Ids of every class that occurs."""
    names = sorted({name for names in table.column("objects").to_pylist() for name in names})
    return {name: vocabulary.ids(name) for name in names}


def write_files(folder: Path, table: pa.Table, vocabulary: ClassVocabulary, summary: dict[str, Any]) -> None:
    """Write the shares of every object as Parquet, the report, and the figure drawn from the summary."""
    import pyarrow.parquet as pq

    from dualstream.data_builders.token_maps.atomic import atomic_file

    from .lens_figure import draw
    from .lens_shares import shares_of, shares_table

    found = shares_of(table, class_table(table, vocabulary), seed=summary["seed"])
    with atomic_file(folder / SHARES) as file:
        pq.write_table(shares_table(found), file, compression="zstd")
    draw(summary, folder / FIGURE)
    (folder / REPORT).write_text(format_report(summary) + f"\n\n![shares by depth]({FIGURE})\n", encoding="utf-8")


def format_report(summary: dict[str, Any]) -> str:
    """The figures as Markdown, shares in percent with 95 % intervals."""
    from ..tables import markdown_table, percent
    from .lens_shares import MEANING, OBJECT, SETS

    whole, accounting = summary["whole"], summary["accounting"]
    rows = [["cells", "pictures", "best depth, in-sample", "best depth, cross-fitted", "best per picture, in-sample",
             "best per picture, cross-fitted", "object minus control"]]  # fmt: skip
    for kind in SETS:
        found = whole[kind]
        if found is None:
            rows.append([kind, "0", *["–"] * 5])
            continue
        one, each = found["best_depth"], found["best_depth_per_image"]
        depth = "none" if each["mean_depth"] is None else f"{each['mean_depth']:.1f}"
        lift = "" if kind == OBJECT else f"{percent(found['lift'], signed=True)}, p {found['lift']['p_value']:.2g}"
        rows.append(
            [kind, str(found["images"]), f"{percent(one['in_sample'])} at {one['depth']}",
             percent(one["cross_fitted"]), f"{percent(each['in_sample'])} at {depth}",
             "–" if each["cross_fitted"] is None else percent(each["cross_fitted"]), lift]
        )  # fmt: skip
    cells = whole["cells"]
    left_out = "; ".join(f"{name}: {_count(value)}" for name, value in accounting.items())
    gains = summary["log_probability"]
    lines = [
        f"# What the cells of an object read as: {summary['model']}",
        "Share of cells whose most likely vocabulary entry is the class, in % with 95 % intervals over pictures, on "
        f"{summary['data']} ({summary['split']}); an object covers at least {100 * summary['min_coverage']:g} % of "
        "its cells. Depth: blocks of the language model run; the final norm is applied once at every depth.",
        markdown_table(rows),
        "*In-sample* takes the depth with the largest share on the pictures it is reported for; *cross-fitted* "
        "chooses it on other pictures (five folds), or, per picture, on every other cell. The published figure is the "
        "in-sample maximum per picture. Differences are paired, at the object's cross-fitted depths; p-values are of "
        "a sign-flip test.",
        "\n".join(f"- {kind}: {meaning}." for kind, meaning in MEANING.items()),
        f"All {cells['n_cells']} cells together at depth {cells['depth']}: {percent(cells['by_image'])} with pictures "
        f"as clusters, {percent(cells['by_image_and_class'])} with pictures and classes as crossed clusters.",
    ]
    if gains:
        last = gains[-1]
        lines.append(
            f"Log-probability of the class, object minus outside cells: {_nats(gains[0]['difference'])} nats at depth "
            f"{gains[0]['depth']}, {_nats(last['difference'])} at depth {last['depth']}."
        )
    lines.append(f"Accounting: {left_out}.")
    return "\n\n".join(lines)


def _count(value: Any) -> str:
    return ("none" if not value else ", ".join(value)) if isinstance(value, list) else str(value)


def _nats(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"
