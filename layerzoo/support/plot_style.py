"""How plots look."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too, without their yellow; two more.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#444444", "#CC79A7")
COLOURS += ("#7F6000", "#661155")
MARKERS = "osD^vPX*"  # of another length, so that a colour comes back with another marker


def tidy(axes: Any, grid: str = "both") -> None:
    """Two spines, and a grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)
