"""Accuracy on each task after each phase, a panel an arm."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from layerzoo.support.figures import heat_map

from ..findings import Findings
from ..rows import ArmRow
from .canvas import wrapped

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
