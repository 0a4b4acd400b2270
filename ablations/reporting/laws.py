"""The scaling laws that a grid asks for, fitted to its finished cells."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cells.report import ScalingLaw
from .results import CellResult, GridResults
from .scaling import ScalingFit, fit_scaling


@dataclass(frozen=True)
class FittedLaw:
    """A law of one group of arms.

    group: its options. cells: what is fitted. x [m, variables], y [m]: of these cells.
    left_out: how many finished cells say nothing of y, and why, in words.
    scaling: None if there is no cell to fit.
    """

    law: ScalingLaw
    group: str
    cells: list[CellResult]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    left_out: dict[str, int]
    scaling: ScalingFit | None


def fit_laws(results: GridResults) -> list[FittedLaw]:
    """Every law of every group. Seeds of an arm are one configuration of the fit."""
    out = []
    for law in results.report.scaling:
        groups: dict[str, list[CellResult]] = {}
        for cell in results.cells:
            options = [cell.options[axis] for axis in law.by if axis in cell.options]
            groups.setdefault(",".join(options), []).append(cell)
        out += [_fit_group(law, group, cells) for group, cells in groups.items()]
    return out


def _fit_group(law: ScalingLaw, group: str, cells: Sequence[CellResult]) -> FittedLaw:
    used: list[CellResult] = []
    left_out: dict[str, int] = {}
    for cell in (cell for cell in cells if cell.metrics):
        if fault := _why_left_out(law, cell):
            left_out[fault] = left_out.get(fault, 0) + 1
        else:
            used.append(cell)
    x = np.array([[cell.metrics[name] for name in law.x] for cell in used], dtype=np.float64)
    y = np.array([cell.metrics[law.y] for cell in used], dtype=np.float64)
    scaling = None
    if used:
        arms = [cell.arm for cell in used]
        scaling = fit_scaling(x[:, 0] if len(law.x) == 1 else x, y, arms, rises=law.rises)
    return FittedLaw(law, group, used, x, y, left_out, scaling)


def _why_left_out(law: ScalingLaw, cell: CellResult) -> str | None:
    """Why a finished cell says nothing of the law."""
    missing = [name for name in (law.y, *law.x) if cell.metrics.get(name) is None]
    if missing:
        return f"no {missing[0]}"
    y = cell.metrics[law.y]
    if not math.isfinite(y) or y <= 0:
        return f"{law.y} is below the smallest that was tested" if y == 0 else f"{law.y} is {y}"
    if law.y.startswith("capacity/") and y == _largest_tested(cell):
        return f"{law.y} is the largest that was tested, or more"
    return None


def _largest_tested(cell: CellResult) -> int | None:
    tested = [re.fullmatch(r"accuracy_pairs/(\d+)", name) for name in cell.metrics]
    return max((int(found[1]) for found in tested if found), default=None)
