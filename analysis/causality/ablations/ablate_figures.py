"""Figures of an ablation run, drawn from its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualstream.analysis.figure_style import CONTROL, PALETTE, curve, figure, save

DESTROYED, DOSE, DEPTH = "destroyed.png", "dose.png", "depth.png"
COLORS = {"object": PALETTE[0], "ig": PALETTE[5], "attribution": PALETTE[1], "register": PALETTE[2], "all": PALETTE[6]}


def draw(summary: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draw all figures that the summary has data for.

    Returns:
        File name -> what it shows.
    """
    drawn = {DESTROYED: "share of right answers destroyed, by condition"}
    _destroyed(summary["settings"], folder / DESTROYED)
    if _dose(summary["settings"], folder / DOSE):
        drawn[DOSE] = "share destroyed by number of tokens"
    if _depth(summary["arms"], folder / DEPTH):
        drawn[DEPTH] = "share destroyed by depth of the replacement"
    return drawn


def color_of(condition: str) -> str:
    """Colour of a condition; controls are grey."""
    word = condition.split("-")[0].split("+")[0]
    return COLORS.get(word, CONTROL)


def _destroyed(settings: dict[str, Any], path: Path) -> None:
    order = list(dict.fromkeys(entry["condition"] for found in settings.values() for entry in found["conditions"]))
    with figure(1, len(settings), size=(1.6 + 2.9 * len(settings), 0.6 + 0.19 * len(order))) as (fig, axes):
        for place, (setting, found) in enumerate(settings.items()):
            axis = axes[0, place]
            own = {entry["condition"]: entry for entry in found["conditions"] if entry["destroyed"]}
            for height, name in enumerate(reversed(order)):
                if name in own:
                    _point(axis, height, own[name]["destroyed"], color_of(name))
            names = [f"{name} ({own[name]['tokens']:.0f})" if name in own else name for name in reversed(order)]
            axis.set_yticks(range(len(order)), names if not place else [""] * len(order))
            right = found["baseline"]["accuracy"]
            axis.set_title(f"{setting}: {100 * right['value']:.0f} % of {right['n']} right before")
            axis.set_xlim(-3, 103)
            axis.set_xlabel("right answers destroyed, %")
        save(fig, path)


def _point(axis: Any, height: int, estimate: dict[str, float], color: str) -> None:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    axis.plot([low, high], [height, height], color=color, linewidth=2.2, alpha=0.5)
    axis.plot([value], [height], "o", color=color, markersize=4.5)


def _dose(settings: dict[str, Any], path: Path) -> bool:
    series = {
        "object and rings": (("object", "object+1", "object+2"), PALETTE[0]),
        "integrated gradients": ("ig-", PALETTE[5]),
        "random": ("random-", CONTROL),
    }
    with figure(1, len(settings), size=(1.0 + 2.9 * len(settings), 2.6)) as (fig, axes):
        found_any = False
        for place, (setting, found) in enumerate(settings.items()):
            axis = axes[0, place]
            for label, (names, color) in series.items():
                own = [e for e in found["conditions"] if e["destroyed"] and _in_series(e["condition"], names)]
                own.sort(key=lambda entry: entry["tokens"])
                if len(own) > 1:
                    found_any = True
                    curve(axis, [e["tokens"] for e in own], [_hundred(e["destroyed"]) for e in own], label, color)
            axis.set_title(setting)
            axis.set_ylim(-3, 103)
            axis.set_xlabel("tokens replaced (mean)")
        axes[0, 0].set_ylabel("right answers destroyed, %")
        axes[0, -1].legend(loc="center right")
        if found_any:
            save(fig, path)
    return found_any


def _in_series(name: str, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return name in wanted
    return name.startswith(wanted) and name.removeprefix(wanted).isdecimal()


def _depth(arms: list[dict[str, Any]], path: Path) -> bool:
    own = [arm for arm in arms if arm["replacement"] == "mean" and arm["destroyed"]]
    settings = list(dict.fromkeys(arm["setting"] for arm in own))
    if len({arm["depth"] for arm in own}) < 2:
        return False
    colors = {"object": PALETTE[4], "object+1": PALETTE[0], "all": PALETTE[6], "translated+1": CONTROL}
    with figure(1, len(settings), size=(1.0 + 3.0 * len(settings), 2.6)) as (fig, axes):
        for place, setting in enumerate(settings):
            axis = axes[0, place]
            for name, color in colors.items():
                points = [arm for arm in own if arm["setting"] == setting and arm["condition"] == name]
                points.sort(key=lambda arm: arm["depth"])
                if points:
                    x = [max(arm["depth"], 0) for arm in points]
                    curve(axis, x, [_hundred(arm["destroyed"]) for arm in points], name, color)
            axis.set_title(f"{setting}, {own[0]['images']} pictures")
            axis.set_ylim(-3, 103)
            axis.set_xlabel("blocks run before (0: connector)")
        axes[0, 0].set_ylabel("right answers destroyed, %")
        axes[0, -1].legend(loc="best")
        save(fig, path)
    return True


def _hundred(estimate: dict[str, float]) -> dict[str, float]:
    return {name: 100 * estimate[name] for name in ("value", "low", "high")}
