"""The picture of a benchmark: time against T, one panel a measure, one line an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from layerzoo.support.plot_style import COLOURS, MARKERS, tidy

from .calls import MEASURES
from .run import OURS, BenchRow

CROWD = 6
"""Lines that a panel can hold; of more, every layer gets a row of panels of its own."""
LABELS = {measure: "ms a call" for measure in MEASURES.values()} | {
    "decode": "ms a step (a token of each row)"
}


def plot(title: str, rows: Sequence[BenchRow], path: Path) -> None:
    """Draw the rows that have a time, to a file of the path's kind."""
    rows = [row for row in rows if row.ms]
    layers = list(dict.fromkeys(row.layer for row in rows))
    measures = list(dict.fromkeys(row.measure for row in rows))
    crowded = len({(row.layer, row.impl) for row in rows}) > CROWD
    groups = [[layer] for layer in layers] if crowded else [layers]
    together = len(groups[0]) > 1
    figure, grid = plt.subplots(
        len(groups),
        len(measures),
        figsize=(1.8 + 3.2 * len(measures), 0.9 + 2.8 * len(groups)),
        layout="constrained",
        sharex=True,
        sharey="col",
        squeeze=False,
    )
    handles: dict[str, Any] = {}
    numbers: dict[Any, int] = {}  # of a colour: one a line, or one an implementation of all layers
    for axes_row, group in zip(grid, groups, strict=True):
        for axes, measure in zip(axes_row, measures, strict=True):
            lines: dict[str, list[BenchRow]] = {}
            for row in rows:
                if row.layer in group and row.measure == measure:
                    lines.setdefault(label(row, together), []).append(row)
            for name, points in lines.items():
                key = name if together else points[0].impl
                handles[name] = draw(axes, points, numbers.setdefault(key, len(numbers)))
            axes.set_title(measure if len(groups) == 1 else f"{group[0]}: {measure}", fontsize=10)
            axes.set_ylabel(LABELS[measure])
            decorate(axes, [row.T for row in rows])
    for axes in grid[-1]:
        axes.set_xlabel("T, tokens a sequence")
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label(row: BenchRow, together: bool) -> str:
    name = f"{row.impl} (yardstick)" if row.yardstick else row.impl
    if together:
        return row.layer if row.impl == OURS else f"{row.layer}, {name}"
    return name


def draw(axes: Any, points: Sequence[BenchRow], n: int) -> Any:
    """One line, with its quartiles as a band: ours solid, peers dashed, yardsticks dotted."""
    ours, yardstick = points[0].impl == OURS, points[0].yardstick
    colour = COLOURS[n % len(COLOURS)]
    lengths = [row.T for row in points]
    spreads = [row.ms for row in points if row.ms]
    axes.fill_between(
        lengths, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.2, lw=0
    )
    (line,) = axes.plot(
        lengths,
        [s.median for s in spreads],
        color=colour,
        marker=MARKERS[n % len(MARKERS)],
        ls="-" if ours else ":" if yardstick else "--",
        lw=2.2 if ours else 1.4,
        ms=5,
    )
    return line


def decorate(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    tidy(axes)
