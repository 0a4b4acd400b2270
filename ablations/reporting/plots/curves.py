"""Plots of metrics that share a name and differ in numbers: curves, and continual matrices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from layerzoo.support.curve_plots import families, heat_map, write_not_finite
from layerzoo.support.plot_style import COLOURS, tidy

from ..arm_rows import ArmRow, is_share
from ..findings import Findings
from .canvas import (
    add_legend,
    arm_styles,
    rows_by_first_axis,
    show_percent,
    width_of_names,
    wrapped,
)

ARMS_PER_PANEL = len(COLOURS)
"""A panel has so many arms at most."""
MOST_PANELS = 8
BINNED = re.compile(r"recall_lag|\w+_at|\w+_position")
"""Families whose number n stands for a bin, n to 2 n - 1."""
SHOWN_ELSEWHERE = re.compile(
    r"perplexity|bits_per_byte|queries|ceiling|half_life|continual|chance"
)

X_LABELS = {"recall_lag": "lag: tokens between the value and its query"}


@dataclass(frozen=True)
class CurveFamily:
    """A family of figures. sides: what its numbers are of. tags: its figures' whole names."""

    name: str
    sides: tuple[str, ...]
    tags: dict[tuple[int, ...], str]

    @property
    def seconds(self) -> list[tuple[int, ...]]:
        """The second numbers; one empty one if there is none."""
        return sorted({at[1:] for at in self.tags})


def curve_families(findings: Findings) -> list[CurveFamily]:
    """What the arms have curves of; by the parts of a task (`length=64`), those of the figures
    that the table shows."""
    names = [
        *dict.fromkeys(n for row in findings.rows for cell in row.cells for n in cell.metrics)
    ]
    shown = {findings.headline, *findings.results.report.columns, "loss/held_out"}
    # With numbers as figures, the points of a family say which names they are of.
    found = families({name: n for n, name in enumerate(names)})
    return [
        CurveFamily(
            family.name, family.sides, {at: names[int(n)] for at, n in family.points.items()}
        )
        for family in found
        if not SHOWN_ELSEWHERE.search(family.name)
        and not {"task", "phase"} & {*family.sides}
        and (len(family.sides) == 2 or "/" not in family.name or family.name in shown)
        and len({at[1:] for at in family.points}) <= MOST_PANELS
    ]


def plot_curves(findings: Findings, family: CurveFamily) -> Figure:
    """A panel for at most nine arms; of a family of two numbers, for each of the second."""
    measured = {
        second: [row for row in findings.rows if _has_points(row, family, second)]
        for second in family.seconds
    }
    parts = [(part, second) for second, rows in measured.items() for part in _panel_rows(rows)]
    rows = [row for row in findings.rows if any(row in some for some in measured.values())]
    names = [row.arm for row in rows]
    width, height = (
        5.6 + width_of_names(names, 8),
        max(2.6, 0.17 * min(ARMS_PER_PANEL, len(rows)) + 0.8),
    )
    figure = Figure(figsize=(width, 0.4 + height * len(parts)), layout="constrained")
    panels: Any = figure.subplots(len(parts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    means: list[float] = []
    for axes, (part, second) in zip(panels, parts, strict=True):
        means += _draw_panel(axes, findings, family, part, second)
        if second:
            axes.set_title(f"{family.sides[1]} {second[0]}", fontsize=9)
    if is_share(next(iter(family.tags.values()))):
        panels[0].set_ylim(-0.04, 1.04)
        show_percent(panels[0].yaxis)
    elif means:
        # By the means: the interval of two seeds may be wider than all of the figure.
        low, high = min(means), max(means)
        room = 0.3 * (high - low) or 0.1 * abs(high) or 1.0
        panels[0].set_ylim(low - room, high + room)
    panels[-1].set_xlabel(X_LABELS.get(family.name, family.sides[0]))
    return figure


def _has_points(row: ArmRow, family: CurveFamily, second: tuple[int, ...]) -> bool:
    """Whether an arm has a point of the curve: another task may have no such figure."""
    return any(row.estimate(tag).n for at, tag in family.tags.items() if at[1:] == second)


def _panel_rows(rows: Sequence[ArmRow]) -> list[list[ArmRow]]:
    """By the options of the first axis if that makes no panel too full, else as they come."""
    if len(rows) <= ARMS_PER_PANEL:
        return [[*rows]]
    return rows_by_first_axis(rows) or [
        [*rows[n : n + ARMS_PER_PANEL]] for n in range(0, len(rows), ARMS_PER_PANEL)
    ]


def _draw_panel(
    axes: Any,
    findings: Findings,
    family: CurveFamily,
    rows: Sequence[ArmRow],
    second: tuple[int, ...],
) -> list[float]:
    """Draw some arms; all means that are finite."""
    style, means = arm_styles(findings.rows), list[float]()
    firsts = sorted({at[0] for at in family.tags if at[1:] == second})
    for row in rows:
        found = [(n, row.estimate(family.tags[n, *second])) for n in firsts]
        found = [(n, estimate) for n, estimate in found if estimate.n]
        if not found:
            continue
        colour, marker = style[row.arm]
        at = [n for n, _ in found]
        mean, half, _ = np.array([estimate for _, estimate in found]).T
        known = np.isfinite(mean)
        means += mean[known].tolist()
        write_not_finite(axes, at, mean, colour)
        mean, half = np.where(known, mean, np.nan), np.where(known, half, np.nan)
        axes.plot(at, mean, color=colour, marker=marker, ms=4, label=wrapped(row.arm))
        axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.1, lw=0)
    if firsts and firsts[0] > 0 and firsts[-1] >= 8 * firsts[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(firsts))
    binned = BINNED.fullmatch(family.name)
    axes.set_xticks(firsts, [f"{n}-{2 * n - 1}" if binned and n > 1 else f"{n}" for n in firsts])
    axes.set_ylabel(family.name)
    if family.name == "recall_lag" and findings.reach is not None:
        # A bin's point stands at its lower edge; the reach is one short of the key's distance.
        axes.axvline(findings.reach - 0.5, color="0.4", ls="--", lw=1, label="window's reach")
    add_legend(axes)
    tidy(axes)
    return means


MATRIX_METRIC = re.compile(r"continual_matrix/phase=(\d+)/task=(\d+)")
PANELS_ACROSS = 3
"""Panels in a line."""


def plot_continual(findings: Findings) -> Figure | None:
    """The matrices, means over seeds; None if no arm has one."""
    matrices = {
        row.arm: found for row in findings.rows if (found := _accuracy_matrix(row)) is not None
    }
    if not matrices:
        return None
    across = min(PANELS_ACROSS, len(matrices))
    down = -(-len(matrices) // across)
    rows, columns = next(iter(matrices.values()))[0].shape
    width, height = max(2.4, 0.5 * columns + 1.1), max(2.0, 0.34 * rows + 0.9)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    panels: Any = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(matrices) :]:
        axes.remove()
    for axes, (arm, (values, phases, tasks)) in zip(panels.flat, matrices.items(), strict=False):
        heat_map(axes, values, phases, tasks)
        axes.set_title(wrapped(arm), fontsize=8)
        axes.set_xlabel("task")
        axes.set_ylabel("after phase")
    return figure


def _accuracy_matrix(row: ArmRow) -> tuple[Any, list[int], list[int]] | None:
    """Accuracy [phase, task], and the numbers of both."""
    names = {name for cell in row.cells for name in cell.metrics}
    found = {
        (int(m[1]), int(m[2])): m[0] for name in names if (m := MATRIX_METRIC.fullmatch(name))
    }
    if not found:
        return None
    phases, tasks = (sorted({at[side] for at in found}) for side in (0, 1))
    values = np.ma.masked_all((len(phases), len(tasks)))
    for (phase, task), name in found.items():
        values[phases.index(phase), tasks.index(task)] = row.estimate(name).mean
    return values, phases, tasks
