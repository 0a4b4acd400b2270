"""The picture of a grid: accuracy by arm, and recall by lag; of two axes, accuracy by both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from layerzoo.figures import heat_map
from layerzoo.style import COLOURS, MARKERS, tidy

from .report import bound_of
from .rows import Row


def plot(title: str, rows: Sequence[Row], reach: int | None) -> Figure | None:
    """Draw the finished arms; None if none has an accuracy to draw."""
    axes = [
        [*dict.fromkeys(names)] for names in zip(*(r.options.values() for r in rows), strict=True)
    ]
    if len(axes) == 2 and min(map(len, axes)) > 1 and any(row.cells for row in rows):
        return _by_both(title, rows, axes)
    return _by_arm(title, rows, reach)


def _by_both(title: str, rows: Sequence[Row], axes: list[list[str]]) -> Figure:
    """A heat map of the mean accuracy over seeds, the first axis down, the second along."""
    down, along = axes
    values = np.full((len(down), len(along)), np.nan)
    for row in rows:
        first, second = row.options.values()
        values[down.index(first), along.index(second)] = row.estimate(row.headline).mean
    size = (2.5 + 1.2 * len(along), 1.6 + 0.36 * len(down))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.add_subplot()
    heat_map(panel, values, down, along)
    panel.set_title(title, fontsize=10)
    return figure


def _by_arm(title: str, rows: Sequence[Row], reach: int | None) -> Figure | None:
    rows = [row for row in rows if row.values("recall/accuracy")]
    if not rows:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n, row in enumerate(rows):
        colour = COLOURS[n % len(COLOURS)]
        seeds, y = row.values("recall/accuracy"), len(rows) - 1 - n
        left.scatter(seeds, [y] * len(seeds), color=colour, alpha=0.45, s=28, zorder=2)
        left.plot([row.estimate("recall/accuracy").mean], [y], "|", color=colour, ms=22, mew=3)
        lags = row.curve("recall_lag")
        right.plot(
            list(lags),
            [lags[edge].mean for edge in lags],
            marker=MARKERS[n % len(MARKERS)],
            color=colour,
            label=row.arm,
        )
    left.set_yticks(range(len(rows)), [row.arm for row in reversed(rows)])
    left.set_xlim(-0.02, 1.04)
    left.set_ylim(-0.5, len(rows) - 0.5)
    left.set_xlabel("recall of the test queries (dots: seeds, bar: mean)")
    if bound := bound_of(rows):
        left.axvline(bound[0], color="0.5", ls="--", lw=1)
        left.annotate(
            "most that the window allows",
            (bound[0], len(rows) - 0.45),
            ha="center",
            color="0.35",
            fontsize=9,
            annotation_clip=False,
        )
    edges = sorted({edge for row in rows for edge in row.curve("recall_lag")})
    right.set_xscale("log", base=2)
    right.xaxis.set_major_locator(FixedLocator(edges))
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xticklabels([f"{e}-{2 * e - 1}" if e > 1 else "1" for e in edges])
    right.set_xlabel("lag: tokens between the value and its query")
    right.set_ylabel("recall (mean over seeds)")
    right.set_ylim(-0.04, 1.04)
    if reach is not None:
        # A bin's point stands at its lower edge; the reach is one short of the key's distance.
        right.axvline(reach - 0.5, color="0.5", ls="--", lw=1)
        right.annotate(
            "reach of the \nwindow arm ",
            (reach - 0.5, 0.5),
            ha="right",
            va="center",
            color="0.35",
            fontsize=9,
        )
    for axis in (left.xaxis, right.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        tidy(axes, grid="x" if axes is left else "y")
    figure.suptitle(title)
    return figure
