"""Figures of the position ablations, from their effects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualstream.analysis.figure_style import CONTROL, PALETTE, figure, save

if TYPE_CHECKING:
    import pandas as pd

    from ..effects import Effect

LABELS = {
    "vision_rotation": "vision RoPE",
    "vision_rotation_h": "vision RoPE, height",
    "vision_rotation_w": "vision RoPE, width",
    "vision_table": "vision table",
    "image_in_place": "image tokens, one place",
    "image_zero": "image tokens, position 0",
    "position_ids": "position ids shuffled",
    "tokens_global": "tokens shuffled",
    "tokens_row": "tokens, within rows",
    "tokens_column": "tokens, within columns",
    "tokens_block": "tokens, within 2 x 2",
}
Effects = Mapping[tuple[str, str], "Effect"]


def draw_whole(effects: Effects, arms: Mapping[str, str], path: Path) -> Path:
    """Change of accuracy of the arms that concern all blocks."""
    shown = [arm for arm in arms if (arm, "spatial") in effects]
    with figure(1, 1, (6.2, 0.34 * len(shown) + 1.1)) as (drawn, axes):
        panel = axes[0, 0]
        for shift, question, color in ((-0.14, "spatial", PALETTE[0]), (0.14, "presence", CONTROL)):
            found = [effects[arm, question].estimate for arm in shown]
            heights = [number + shift for number in range(len(shown))]
            _points(panel, [each.value for each in found], heights, found, color, question, horizontal=True)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(shown)), [LABELS[arm] for arm in shown])
        panel.invert_yaxis()
        panel.set_xlabel("change of accuracy, points (95 % over object pairs)")
        panel.legend(loc="lower left")
        return save(drawn, path)


def draw_by_block(frame: pd.DataFrame, effects: Effects, path: Path) -> Path:
    """Change of the spatial margin and accuracy by block: deleted in it only, and from it on."""
    arms = frame.drop_duplicates("arm")
    arms = arms[arms["scope"] != "all"]
    kinds = [kind for kind in LABELS if kind in set(arms["kind"])]
    with figure(len(kinds), 2, (8.4, 2.5 * len(kinds))) as (drawn, axes):
        for panel in axes.flatten()[1:]:
            panel.sharey(axes[0, 0])
        for line, kind in zip(axes, kinds, strict=True):
            for panel, (scope, title) in zip(
                line, (("only", "in one block"), ("from", "from a block on")), strict=True
            ):
                own = arms[(arms["kind"] == kind) & (arms["scope"] == scope)].sort_values("block")
                names, blocks = list(own["arm"]), list(own["block"])
                if scope == "from":  # from the first block on is everywhere
                    names, blocks = [kind, *names], [0, *blocks]
                for shift, question, color in ((0.05, "presence", CONTROL), (-0.05, "spatial", PALETTE[0])):
                    found = [effects[name, question].estimate for name in names]
                    at = [block + shift for block in blocks]
                    panel.plot(at, [each.value for each in found], color=color)
                    _points(panel, at, [each.value for each in found], found, color, question)
                panel.axhline(0, color="black", linewidth=0.8)
                panel.set_xticks(blocks)
                panel.set_title(f"{LABELS[kind]}, {title}")
                panel.set_xlabel("block (from 0)")
                panel.set_ylabel("accuracy, points")
        axes[0, 0].legend()
        return save(drawn, path)


def _points(
    panel: Any, x: list[float], y: list[float], found: list[Any], color: str, label: str, horizontal: bool = False
) -> None:
    spread = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
    errors = {"xerr": spread} if horizontal else {"yerr": spread}
    panel.errorbar(x, y, **errors, fmt="o", color=color, capsize=2, label=label)
