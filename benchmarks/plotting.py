"""Figures for the documents: the same numbers give the same SVG, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOTS = Path(__file__).resolve().parents[1] / "docs" / "plots"
COLORS = ("#0b5394", "#b45f06", "#38761d", "#741b47")
GREY = "#8a8a8a"


def panels(count: int, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure and its `count` panels, in rows of so many columns."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 11, "svg.hashsalt": "keyhole", "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 12})
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.5 * rows + 0.6), squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for axis in axes.flat[:count]:
        axis.grid(color="#e0e0e0", linewidth=0.6)
    return figure, list(axes.flat[:count])


def save(figure: Any, title: str, path: Path) -> Path:
    """Write a figure as SVG, with the legend of its first panel below all of them."""
    from matplotlib import pyplot as plt

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=max(1, len(labels)), fontsize=11)
    figure.suptitle(title, fontsize=13)
    figure.tight_layout(rect=(0, 0.06, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path
