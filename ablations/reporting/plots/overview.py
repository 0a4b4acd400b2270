"""Plots of all arms at once: by headline, by two axes, against their state or another size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from layerzoo.support.curve_plots import heat_map
from layerzoo.support.plot_style import COLOURS, MARKERS, tidy

from ..arm_rows import ArmRow, is_accuracy, is_share
from ..findings import Findings, shared_window_bound
from ..scaling import FittedLaw
from .canvas import add_legend, arm_styles, legend_styles, show_percent, width_of_names, wrapped

ARMS_WITH_INTERVALS = 9
"""So many arms have intervals against the bytes of state; more would hide each other."""


def plot_headline(findings: Findings) -> Figure | None:
    rows = [row for row in findings.rows if row.scores]
    if not rows:
        return None
    names = [wrapped(row.arm) for row in rows]
    lines = max(1 + name.count("\n") for name in names)
    size = 5.5 + width_of_names([row.arm for row in rows]), 1.4 + (0.1 + 0.17 * lines) * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    style, places = arm_styles(findings.rows), range(len(rows) - 1, -1, -1)
    for y, row in zip(places, rows, strict=True):
        colour, _ = style[row.arm]
        mean, half, _ = row.estimate(row.metric)
        axes.plot(row.scores, [y] * len(row.scores), "o", color=colour, alpha=0.45, ms=5, mew=0)
        if not np.isfinite(mean):
            place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
            axes.text(0.01, y, f"mean {mean}", color=colour, **place)
        if np.isfinite(half):
            axes.errorbar(mean, y, xerr=half, color=colour, capsize=3, lw=1.5)
        axes.plot([mean], [y], "|", color=colour, ms=14, mew=2.5)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{findings.headline} (dots: seeds; bar: mean, with 95% t interval)")
    if is_accuracy(findings.headline):
        _draw_limits(axes, rows, places)
        low = min(0.0, *(score for row in rows for score in row.scores if math.isfinite(score)))
        axes.set_xlim(low - 0.03, 1.03)
    if is_share(findings.headline):
        show_percent(axes.xaxis)
    tidy(axes, grid="x")
    return figure


def _draw_limits(axes: Any, rows: Sequence[ArmRow], places: Sequence[int]) -> None:
    """What the window allows, and chance, of each arm, joined where they are the same."""
    bounds = [shared_window_bound([row]) for row in rows]
    chances = [row.estimate("chance").mean for row in rows]
    for label, values, line in (
        ("most that the window allows", [b[0] if b else np.nan for b in bounds], "--"),
        ("chance", chances, ":"),
    ):
        if np.isfinite(values).any():
            low, high = np.array(places) - 0.5, np.array(places) + 0.5
            axes.vlines(values, low, high, color="0.4", linestyles=line, lw=1, label=label)
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)


def plot_two_axes(findings: Findings) -> Figure | None:
    """A heat map of the mean over seeds, the first axis down, the second along; of a grid that
    has all pairs of two axes."""
    axes = [*dict.fromkeys(axis for row in findings.rows for axis in row.options)]
    if len(axes) != 2 or any(len(row.options) != 2 for row in findings.rows):
        return None
    down, along = ([*dict.fromkeys(row.options[axis] for row in findings.rows)] for axis in axes)
    if min(len(down), len(along)) < 2 or not any(row.scores for row in findings.rows):
        return None
    values = np.ma.masked_all((len(down), len(along)))
    for row in (row for row in findings.rows if row.scores):
        place = down.index(row.options[axes[0]]), along.index(row.options[axes[1]])
        values[place] = row.estimate(row.metric).mean
    width = max(0.7, width_of_names(along) + 0.15)
    size = (2.5 + width_of_names(down) + width * len(along), 1.3 + 0.36 * len(down))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.add_subplot()
    heat_map(panel, values, [wrapped(name) for name in down], [wrapped(name) for name in along])
    panel.set_ylabel(axes[0])
    panel.set_xlabel(axes[1])
    return figure


def plot_against_state(findings: Findings) -> Figure | None:
    """The headline against the bytes of state, if the arms differ in them."""
    rows = [row for row in findings.rows if row.scores and row.estimate("state_bytes").mean > 0]
    if len({row.estimate("state_bytes").mean for row in rows}) < 2:
        return None
    style, told = arm_styles(findings.rows), legend_styles(findings.rows)
    size = 5.5 + width_of_names([*told], 8), max(3.6, 0.8 + 0.18 * len(told))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        colour, marker = style[row.arm]
        mean, half, _ = row.estimate(row.metric)
        error = half if len(rows) <= ARMS_WITH_INTERVALS and np.isfinite(half) else None
        x = row.estimate("state_bytes").mean
        axes.errorbar(x, mean, error, color=colour, marker=marker, ls="none", capsize=2, lw=1)
    for name, (colour, marker) in told.items():
        axes.plot([], [], marker, color=colour, ms=6, label=wrapped(name))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("bytes of state, batch 1, float32")
    axes.set_ylabel(findings.headline)
    if is_accuracy(findings.headline):
        low = min(0.0, *(score for row in rows for score in row.scores if math.isfinite(score)))
        axes.set_ylim(low - 0.04, 1.04)
    if is_share(findings.headline):
        show_percent(axes.yaxis)
    add_legend(axes)
    tidy(axes)
    return figure


def plot_scaling(fits: Sequence[FittedLaw]) -> Figure | None:
    """A law's groups: y against its size, with the best form and its 95% bootstrap band; of two
    sizes, y as measured against y as fitted. Hollow: what was held out for the misses. A fit that
    is refused is not drawn."""
    fits = [fit for fit in fits if fit.cells]
    if not fits:
        return None
    law = fits[0].law
    names = [fit.group or law.y for fit in fits]
    figure = Figure(figsize=(5.8 + width_of_names(names, 8), 4.0), layout="constrained")
    axes = figure.add_subplot()
    two = len(law.x) == 2
    for n, (fit, name) in enumerate(zip(fits, names, strict=True)):
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
        best = fit.scaling.best if fit.scaling and fit.scaling.refused is None else None
        if two and best is None:
            continue
        x = best.predict(fit.x) if two and best else fit.x[:, 0]
        x = np.where(np.isfinite(x), x, np.nan)
        apart = (fit.x == fit.x.max(0)).any(1)
        for some, face, label in ((~apart, colour, wrapped(name)), (apart, "white", None)):
            axes.plot(x[some], fit.y[some], marker, ms=5, mec=colour, mfc=face, label=label)
        if best and not two:
            _draw_fit(axes, best, x, colour)
    if two:
        ends = [
            min(axes.get_xlim()[0], axes.get_ylim()[0]),
            max(*axes.get_xlim(), *axes.get_ylim()),
        ]
        axes.plot(ends, ends, color="0.6", lw=1, ls="--", zorder=1)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{law.y} as fitted" if two else law.x[0])
    axes.set_ylabel(law.y)
    add_legend(axes, title=", ".join(law.by) or None)
    tidy(axes)
    return figure


def _draw_fit(axes: Any, form: Any, x: Any, colour: str) -> None:
    at = np.geomspace(x.min(), x.max(), 100)
    low, high = form.band(at)
    axes.plot(at, form.predict(at), color=colour, lw=1.3)
    axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
