"""The look of all figures of `analysis`: sizes, a palette for colour-blind readers, files that repeat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CONTROL = "#8A8A8A"  # of controls and chance levels, always
BACKGROUND = "#FFFFFF"
DPI = 110
STYLE: Any = {
    "figure.dpi": DPI,
    "figure.facecolor": BACKGROUND,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None) -> Iterator[tuple[Figure, Any]]:
    """A figure in the house style, without touching matplotlib's global state.

    Args:
        rows: of panels.
        columns: of panels.
        size: (width, height) in inches; None: 4.2 x 3 per panel.

    Yields:
        The figure and its (rows, columns) array of axes. Draw and `save` inside the block.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'dualstream[train]'.") from error

    with rc_context(STYLE):
        drawn = Figure(figsize=size or (4.2 * columns, 3.0 * rows), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn, drawn.subplots(rows, columns, squeeze=False)


def save(fig: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (or what the suffix says); the same figure gives the same bytes.

    Args:
        fig: from `figure`.
        path: its folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"Software": None} if path.suffix == ".png" else {"Date": None} if path.suffix == ".svg" else {}
    fig.savefig(path, dpi=DPI, metadata=stamp)
    return path


def curve(axes: Any, x: Any, estimates: list[Any], label: str, color: str, **options: Any) -> None:
    """A line of estimates with its 95 % band.

    Args:
        axes: to draw on.
        x: (n,) numbers.
        estimates: n objects or dicts with `value`, `low` and `high`.
        label: of the legend.
        color: of line and band.
        **options: of ``axes.plot``.
    """
    values, low, high = ([_part(item, name) for item in estimates] for name in ("value", "low", "high"))
    axes.plot(x, values, label=label, color=color, **{"marker": "o", **options})
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _part(estimate: Any, name: str) -> float:
    return estimate[name] if isinstance(estimate, dict) else getattr(estimate, name)
