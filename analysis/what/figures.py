"""Figures of a run, drawn from ``summary.json`` and the stored readings, never from the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.annotated_images import AnnotatedImage
from dualstream.analysis.figure_style import CONTROL, PALETTE, curve, figure, save
from dualstream.processing import visible

from .depth_maps import DepthMaps, Step
from .labels import BACKGROUND_COLOR, LabelSchema
from .segmentation import cells_to_pixels, fill_holes, paint
from .vocabulary import Vocabulary

SUMMARY = "summary.json"
LENS_NAMES = {"normed": "final norm", "plain": "no norm", "tuned": "tuned"}


def draw_figures(folder: Path) -> list[Path]:
    """Draw the curves of a run from the summary in its folder.

    Returns:
        The files written: ``vision_depths.png``, and with objects or a tuned lens ``llm_depths.png``, ``inside.png``.
    """
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    drawn = [_vision_depths(summary, folder)]
    if "emergence" in summary:
        drawn.append(_llm_depths(summary, folder))
    if summary.get("inside"):
        drawn.append(_inside(summary, folder))
    return drawn


def _vision_depths(summary: Mapping[str, Any], folder: Path) -> Path:
    panels = [_flow_panel, _agreement_panel]
    if "stages" in summary:
        panels = [_stage_panel, _graded_panel, _presence_panel, _region_panel, *panels]
    panels = [panel for panel in panels if panel is not _presence_panel or summary.get("presence")]
    if "graded_name" not in summary.get("stages", {}).get("last", {}):
        panels = [panel for panel in panels if panel is not _graded_panel]
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    with figure(rows, columns) as (drawn, axes):
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for panel, axis in zip(panels, axes.flat, strict=False):
            panel(axis, summary)
            axis.axvline(summary["native_vision_depth"], color="black", linewidth=0.8, linestyle=":")
            axis.set_xlabel("vision blocks run (dotted: the model's own)")
            axis.locator_params(axis="x", integer=True)
        drawn.suptitle(
            f"{summary['model']}: by vision depth, {summary['images']} pictures, 95 % intervals", fontsize=10
        )
        return save(drawn, folder / "vision_depths.png")


def _stage_panel(axis: Any, summary: Mapping[str, Any]) -> None:
    stages = summary["stages"]["chosen"]
    x = range(len(stages["name"]))
    curve(axis, x, stages["attribute"], "attributes, r_A", PALETTE[1])
    curve(axis, x, stages["name"], "names, r_R", PALETTE[0])
    curve(axis, x, stages["name_control"], "names of other objects", CONTROL, linestyle="--")
    curve(axis, x, stages["attribute_control"], "attributes of other objects", CONTROL, linestyle=":")
    axis.set(title="Words of the object, share of its cells", ylim=(-0.03, 1.03))
    axis.legend(loc="center right")


def _graded_panel(axis: Any, summary: Mapping[str, Any]) -> None:
    for number, (place, style) in enumerate((("last", "-"), ("norm_matched", "--"))):
        stages = summary["stages"][place]
        x = range(len(stages["graded_name"]))
        suffix = ", norms matched" if number else ""
        curve(axis, x, stages["graded_attribute"], f"attributes{suffix}", PALETTE[1], linestyle=style)
        curve(axis, x, stages["graded_name"], f"names{suffix}", PALETTE[0], linestyle=style)
    axis.axhline(0, color=CONTROL, linewidth=0.8)
    depth = summary["stages"]["last"]["llm_depth"]
    axis.set(title=f"Own word above its rivals, nats, after {depth} LLM blocks")
    axis.legend()


def _presence_panel(axis: Any, summary: Mapping[str, Any]) -> None:
    rows = summary["presence"]["by_depth"]
    x = range(len(rows))
    curve(axis, x, [row["auroc"] for row in rows], "area under ROC", PALETTE[0])
    curve(axis, x, [row["auroc_control"] for row in rows], "area, answers shuffled", CONTROL, linestyle="--")
    curve(axis, x, [row["strict"]["sensitivity"] for row in rows], "strict: finds what is there", PALETTE[2])
    curve(axis, x, [row["strict"]["specificity"] for row in rows], "strict: rejects what is not", PALETTE[1])
    axis.axhline(summary["presence"]["always_no"], color="black", linewidth=0.8, label="accuracy of always no")
    axis.set(title=f"Is it there? {summary['presence']['questions']} questions", ylim=(-0.03, 1.03))
    axis.legend(loc="lower right", fontsize=7)


def _region_panel(axis: Any, summary: Mapping[str, Any]) -> None:
    regions = summary["regions"]
    x = range(len(regions["filled"]))
    for name, label, color, style in (
        ("raw", "words as they are", PALETTE[0], "-"),
        ("filled", "holes filled", PALETTE[2], "-"),
        ("control", "map of another picture", CONTROL, "--"),
    ):
        if all(row is not None for row in regions[name]):
            curve(axis, x, [row["miou"] for row in regions[name]], label, color, linestyle=style)
    axis.axhline(
        regions["cell_majority"]["miou"]["value"], color="black", linewidth=0.8, label="true labels, cell by cell"
    )
    axis.set(title="Regions against masks, mean IoU", ylim=(-0.02, None))
    axis.legend(loc="center right")


def _flow_panel(axis: Any, summary: Mapping[str, Any]) -> None:
    flow = summary["flow"]
    x = range(len(flow["state_cosine"]))
    curve(axis, x, flow["state_cosine"], "tower states, cosine", PALETTE[0])
    curve(axis, x, flow["feature_cosine"], "features, cosine", PALETTE[2])
    curve(axis, x, flow["state_norm_ratio"], "tower states, norm ratio", PALETTE[0], linestyle="--")
    curve(axis, x, flow["feature_norm_ratio"], "features, norm ratio", PALETTE[2], linestyle="--")
    axis.set(title="How near to the native depth")
    axis.legend()


def _agreement_panel(axis: Any, summary: Mapping[str, Any]) -> None:
    rows = summary["words"]
    x = [row["vision_depth"] for row in rows]
    curve(axis, x, [row["agreement_last"] for row in rows], "same word as native depth", PALETTE[0])
    matched = [row["agreement_last_norm_matched"] for row in rows]
    curve(axis, x, matched, "same, norms matched", PALETTE[3], linestyle="--")
    curve(axis, x, [row["meaningful"] for row in rows], "cells that say a word", PALETTE[5])
    axis.set(title="Readings, share of cells", ylim=(-0.03, 1.03))
    axis.legend(loc="center right")


def _llm_depths(summary: Mapping[str, Any], folder: Path) -> Path:
    with figure(1, 3 if "lenses" in summary else 1) as (drawn, axes):
        axis, rows = axes[0, 0], summary["emergence"]
        for number, (lens, label) in enumerate(LENS_NAMES.items()):
            mine = sorted((row for row in rows if row["lens"] == lens), key=lambda row: row["llm_depth"])
            if mine:
                x = [row["llm_depth"] for row in mine]
                style = "-" if lens == "normed" else "--"
                curve(axis, x, [row["emergence"] for row in mine], label, PALETTE[number], linestyle=style)
            if lens == "normed":
                curve(axis, x, [row["control"] for row in mine], "random labels", CONTROL, linestyle="--")
        axis.axvline(summary["llm_depth"], color="black", linewidth=0.8, linestyle=":")
        axis.set(title="Cells in boxes that name the object", ylim=(-0.03, 1.03))
        axis.set_xlabel("language-model blocks run (dotted: chosen)")
        axis.legend(loc="center right")
        if "lenses" in summary:
            for axis, name, title in (
                (axes[0, 1], "agreement", "Same word as the last depth, share of cells"),
                (axes[0, 2], "divergence", "Divergence from the last depth, nats"),
            ):
                _lens_panel(axis, summary, name)
                axis.set(title=title, xlabel="language-model blocks run")
        return save(drawn, folder / "llm_depths.png")


def _lens_panel(axis: Any, summary: Mapping[str, Any], name: str) -> None:
    for number, (lens, label) in enumerate(LENS_NAMES.items()):
        rows = [row for row in summary["lenses"]["table"] if row["lens"] == lens]
        curve(axis, [row["llm_depth"] for row in rows], [row[name] for row in rows], label, PALETTE[number])
    axis.legend()


def _inside(summary: Mapping[str, Any], folder: Path) -> Path:
    titles = {
        "similarity": "Cosine of tower states",
        "attention": "Attention, 1 = uniform",
        "clusters": "Clusters against objects, Rand index",
    }
    names = {
        "inside": ("inside objects", PALETTE[0], "-"),
        "others": ("to other objects", PALETTE[2], "-"),
        "outside": ("to the ground", PALETTE[1], "-"),
        "copies": ("copies on empty ground", CONTROL, "--"),
    }
    shown = [name for name in titles if summary["inside"].get(name)]
    with figure(1, len(shown)) as (drawn, axes):
        for axis, name in zip(axes[0], shown, strict=True):
            rows = summary["inside"][name]
            for key, (label, color, style) in names.items():
                mine = [row for row in rows if key in row]
                if mine:
                    label = "objects of another picture" if (name, key) == ("clusters", "copies") else label
                    label = "k-means" if (name, key) == ("clusters", "inside") else label
                    x = [row["vision_depth"] for row in mine]
                    curve(axis, x, [row[key] for row in mine], label, color, linestyle=style)
            axis.set(title=titles[name], xlabel="vision blocks run")
            axis.locator_params(axis="x", integer=True)
            axis.legend()
        return save(drawn, folder / "inside.png")


def draw_maps(
    pictures: Sequence[tuple[AnnotatedImage, DepthMaps]],
    vocabulary: Vocabulary,
    depths: Sequence[int],
    llm_depth: int,
    path: Path,
    regions: bool = True,
) -> Path:
    """Draw pictures beside their readings: one row per picture, one column per vision depth.

    Args:
        pictures: with their readings at the given depths.
        vocabulary: what ids say.
        depths: vision depths to show.
        llm_depth: language-model blocks run.
        path: of the PNG.
        regions: colour the cells by label, in the schema's palette.
    """
    size = (2.3 * (len(depths) + 1), 2.4 * len(pictures) + 0.4)
    with figure(len(pictures), len(depths) + 1, size) as (drawn, axes):
        for row, (image, maps) in enumerate(pictures):
            picture = image.image()
            axes[row, 0].imshow(picture)
            for column, depth in enumerate(depths, start=1):
                axis = axes[row, column]
                _draw_map(axis, maps, Step(depth, llm_depth), vocabulary, np.asarray(picture), regions)
                if row == 0:
                    own = " (own)" if depth == maps.native_vision_depth else ""
                    axis.set_title(f"{depth} vision blocks{own}")
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        return save(drawn, path)


def _draw_map(
    axis: Any, maps: DepthMaps, step: Step, vocabulary: Vocabulary, picture: np.ndarray, regions: bool
) -> None:
    ids = maps.ids[maps.position(step)][:, 0]
    schema: LabelSchema = vocabulary.schema
    if regions:
        labels = fill_holes(vocabulary.label[ids], maps.geometry.grids, len(schema.labels))
        axis.imshow(paint(cells_to_pixels(labels, maps.geometry), schema))
    else:
        axis.imshow(picture, alpha=0.35)
    width, height = maps.geometry.image_size
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), facecolor=BACKGROUND_COLOR)
    if len(ids) > 150:
        return
    for box, number in zip(maps.geometry.boxes, ids.tolist(), strict=True):
        text = visible(vocabulary.pieces[number])
        if vocabulary.meaningful[number] and box[2] > box[0]:
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            axis.text(
                x - 0.5, y - 0.5, text[:8].replace("$", r"\$"), fontsize=5, ha="center", va="center", clip_on=True
            )
