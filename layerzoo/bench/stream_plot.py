"""The picture of `layerzoo bench generate`: resident memory and time per token against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import StrMethodFormatter

from .plot import COLOURS, plt

if TYPE_CHECKING:
    from .stream import Point

MIB = 2**20


def plot(title: str, runs: Mapping[str, Sequence[Point]], tokens: int, path: Path) -> None:
    """Draw the runs; one that stopped before `tokens` ends in a cross, and says where."""
    figure, (memory, clock) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for colour, (name, found) in zip(COLOURS * len(runs), runs.items(), strict=False):
        x = [p.tokens for p in found]
        stopped = x[-1] < tokens
        label = f"{name} (stopped at {x[-1]:,})" if stopped else name
        for axes, y in (
            (memory, [p.rss / MIB for p in found]),
            (clock, [p.ms for p in found]),
        ):
            axes.plot(x, y, color=colour, lw=1.8, label=label)
            if stopped:
                axes.plot(x[-1:], y[-1:], "x", color=colour, ms=8, mew=2)
    memory.set_ylabel("resident memory of the process, MiB")
    clock.set_ylabel("ms a token")
    for axes in (memory, clock):
        axes.set_xlabel("tokens generated")
        axes.set_xlim(0, tokens)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(title, fontsize=7, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)
