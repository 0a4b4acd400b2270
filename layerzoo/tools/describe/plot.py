"""The picture of a description: state and FLOPs against T, beside full attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from layerzoo.support.plot_style import COLOURS, MARKERS, tidy

from .report import binary, si


def plot(name: str, found: dict[str, Any], path: Path) -> None:
    """Draw to a file of the path's kind."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    lines: dict[str, Any] = {}
    models = zip((name, "full attention"), zip(*found["lengths"], strict=True), strict=True)
    for n, (label, costs) in enumerate(models):
        T = [cost.T for cost in costs]
        style: dict[str, Any] = {"color": COLOURS[n], "marker": MARKERS[n], "ms": 4}
        (lines[label],) = left.plot(T, [cost.state for cost in costs], **style)
        right.plot(T, [cost.mean for cost in costs], **style)
        right.plot(T, [cost.last for cost in costs], **style, ls=":", mfc="white")
    lines["token T alone"] = Line2D([], [], color="0.3", ls=":", marker="o", ms=4, mfc="white")
    left.set_title(f"state after T tokens, caches in {found['dtype']}", fontsize=10)
    right.set_title("FLOPs per token of all layers, mean over T tokens", fontsize=10)
    for axes, unit in ((left, binary), (right, si)):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2 if axes is left else 10)
        axes.xaxis.set_major_formatter(lambda value, _: tokens(value))
        axes.yaxis.set_major_formatter(lambda value, _, unit=unit: unit(value))
        axes.set_xlabel("T, tokens")
        tidy(axes)
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tokens(count: float) -> str:
    """16k, in units of 1024"""
    for unit in ("", "k"):
        if count < 1024:
            return f"{count:g}{unit}"
        count /= 1024
    return f"{count:g}M"
