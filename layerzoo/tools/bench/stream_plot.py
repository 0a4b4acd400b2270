"""The picture of `layerzoo bench generate`: resident memory and time per token against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from layerzoo.support.plot_style import COLOURS, tidy

from .plot import plt

if TYPE_CHECKING:
    from .stream import Point

MIB = 2**20
SMOOTH = 9


def plot(title: str, runs: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw the runs; one that was stopped before others ends in a cross, and says where.

    Resident memory is drawn from its first value on, which is what the process begins with: the
    libraries are most of it, and the same for all.
    """
    tokens = max(found[-1].tokens for found in runs.values())
    figure, (memory, clock) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    for colour, (name, found) in zip(cycle(COLOURS), runs.items(), strict=False):
        x, first = [p.tokens for p in found], found[0].rss
        stopped = x[-1] < tokens
        label = f"{name} ({first / MIB:.0f} MiB at the start"
        label += f"; stopped at {x[-1]:,} tokens)" if stopped else ")"
        grown, ms = [(p.rss - first) / MIB for p in found], [p.cpu_ms for p in found]
        memory.plot(x, grown, color=colour, lw=1.8, label=label)
        clock.plot(x, ms, color=colour, lw=0.8, alpha=0.35)
        clock.plot(x, smooth(ms), color=colour, lw=1.8)
        if stopped:
            memory.plot(x[-1:], grown[-1:], "x", color=colour, ms=8, mew=2)
            clock.plot(x[-1:], smooth(ms)[-1:], "x", color=colour, ms=8, mew=2)
    memory.set_title("resident memory above that at the start, MiB", fontsize=10)
    clock.set_title(f"CPU time, ms a token (bold: median of {SMOOTH} neighbours)", fontsize=10)
    for axes in (memory, clock):
        axes.set_xlabel("tokens generated")
        axes.set_xlim(0, tokens)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        tidy(axes)
    # The axis of a run that is flat shows what it is flat against: 1 MiB at the least.
    memory.set_ylim(bottom=min(0.0, memory.get_ylim()[0]), top=max(1.0, memory.get_ylim()[1]))
    clock.set_ylim(bottom=0)
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel(title, fontsize=7, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """The median of the neighbours: other programs on the machine show in single points."""
    half = SMOOTH // 2
    return [median(values[max(0, n - half) : n + half + 1]) for n in range(len(values))]
