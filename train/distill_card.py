"""The card of a distilled decoder: what it is, how well it reads, how it was trained, with its curves as a picture."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from dualstream.eval.result_tables import percent

CURVES = "curves.png"
FIGURES = {
    "top1": "agreement",
    "top5": "agreement, best five",
    "boundary_f1": "run boundaries, F1",
    "meaningless_f1": "meaningless cells, F1",
    "kept_ratio_difference": "kept tokens under `rle`, difference",
}
READERS = {
    "unembedding": "plain unembedding",
    "decoder": "this decoder",
    "another picture": "control: another picture",
}
GAIN = "_gain"
# left: training loss and its validation; right: validation figures
LOSS_CURVES = {"loss": "training", "eval_loss": "validation"}
FIGURE_CURVES = {"eval_agreement": "agreement", "eval_boundary_f1": "run boundaries, F1"}


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write ``README.md`` and the picture of the curves from the record of a run."""
    draw_curves(record["curves"], folder / CURVES)
    template = Template((Path(__file__).parent / "distill_card.md").read_text(encoding="utf-8"))
    decoder, settings = record["decoder"], record["manifest"]["settings"]
    text = template.substitute(
        model=decoder["model"],
        kind=decoder["kind"],
        teacher=f"{decoder['teacher_depth']} blocks, {'with' if decoder['final_norm'] else 'without'} the final norm",
        parameters=f"{decoder['parameters']:,}",
        multiply_adds=f"{decoder['multiply_adds_per_token']:,}",
        classes=_classes(decoder),
        role=record["measured_on"],
        table=figure_table(record),
        curves=CURVES,
        alpha=decoder["alpha"],
        temperature=decoder["temperature"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        epochs=f"{settings['num_train_epochs']:g}",
        batch=settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"],
        steps=decoder["steps"],
        metric=settings["metric_for_best_model"],
        images=_image_table(record["images"]),
        command=record["manifest"]["command"],
        versions=", ".join(f"{name} {version}" for name, version in record["manifest"]["versions"].items()),
        minutes=f"{record['manifest']['seconds'] / 60:.1f}",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def figure_table(record: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, in per cent with 95 % intervals over images."""
    figures = {name: label for name, label in FIGURES.items() if name in record["figures"]["decoder"]}
    n = record["figures"]["decoder"]["top1"]["n"]
    lines = [
        f"| {n} {record['measured_on']} images, % | " + " | ".join(figures.values()) + " |",
        "| --- |" + " --- |" * len(figures),
    ]
    for reader, label in READERS.items():
        cells = [percent(record["figures"][reader].get(name), 2, signed="difference" in name) for name in figures]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    gains = [percent(record["figures"]["decoder"].get(name + GAIN), 2, signed=True) for name in figures]
    lines.append("| decoder minus unembedding, paired | " + " | ".join(gains) + " |")
    oracle = ["0" if "difference" in name else "100" for name in figures]
    lines.append("| oracle: the model's own map (a second pass) | " + " | ".join(oracle) + " |")
    return "\n".join(lines)


def _classes(decoder: dict[str, Any]) -> str:
    coverage = decoder.get("coverage")
    if coverage is None:
        return f"{decoder['classes']:,} classes: the whole vocabulary"
    covered = f"{100 * coverage['covered']:.2f} % of {coverage['readings']:,} readings of training images"
    return (
        f"{coverage['classes']:,} classes for {coverage['tokens_merged']:,} vocabulary entries; they cover {covered}, "
        f'the rest reads as "{coverage["other_token"]}"'
    )


def _image_table(report: dict[str, dict[str, Any]]) -> str:
    lines = ["| images | source | used | left out: in another set | unreadable |", "| --- | --- | --- | --- | --- |"]
    for role in ("train", "validation", "test"):
        if role in report:
            row = report[role]
            lines.append(
                f"| {role} | `{row['source']}` | {row['images']:,} | {row['left_out']:,} | {row['unreadable']:,} |"
            )
    return "\n".join(lines)


def draw_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the training and validation curves of a log into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, curves, title in zip(
        figure.subplots(1, 2), (LOSS_CURVES, FIGURE_CURVES), ("loss", "validation"), strict=True
    ):
        for name, label in curves.items():
            points = [(row["step"], row[name]) for row in log if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o" if name.startswith("eval") else "", label=label)
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
