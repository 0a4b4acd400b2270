"""An arm of a grid, as its finished cells measured it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cells.cell import Cell
from ..running.folder import DIVERGED, METRICS, read_json
from .statistics import Estimate, mean_interval

ACCURACIES = ("recall/accuracy", "accuracy/all")
"""What a task's headline is, the first that it has."""


@dataclass(frozen=True)
class Row:
    """An arm, or several, over seeds.

    cells, metrics: of the finished ones, in the same order. planned: how many there are in all.
    diverged: how many of them diverged. metric: the headline, where it is not an accuracy.
    """

    arm: str
    options: dict[str, str]
    cells: list[Cell] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    planned: int = 0
    diverged: int = 0
    metric: str | None = None

    @property
    def seeds(self) -> list[str]:
        return [str(cell.seed) for cell in self.cells]

    def values(self, name: str) -> list[float]:
        return [m[name] for m in self.metrics if m.get(name) is not None]

    @property
    def headline(self) -> str:
        """The name of the figure that counts: the grid's, or the accuracy that the task has."""
        return self.metric or next(
            (name for name in ACCURACIES if self.values(name)), ACCURACIES[0]
        )

    def estimate(self, name: str) -> Estimate:
        return mean_interval(self.values(name))

    def lags(self) -> dict[int, Estimate]:
        """Recall by the lower edge of the lag's bin."""
        names = {n for m in self.metrics for n in m if re.fullmatch(r"recall_lag/\d+", n)}
        edges = sorted(int(name.split("/")[1]) for name in names)
        return {edge: self.estimate(f"recall_lag/{edge}") for edge in edges}


def read_rows(cells: Sequence[Cell], out: Path, metric: str | None = None) -> list[Row]:
    """The cells' metrics, grouped by arm, in the grid's order."""
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        mine = [cell for cell in cells if cell.arm == arm]
        found = [(cell, read_json(out / cell.path / METRICS)) for cell in mine]
        finished = [(cell, metrics) for cell, metrics in found if metrics]
        diverged = sum((out / cell.path / DIVERGED).is_file() for cell in mine)
        row = Row(arm, mine[0].options, planned=len(mine), diverged=diverged, metric=metric)
        row.cells.extend(cell for cell, _ in finished)
        row.metrics.extend(metrics for _, metrics in finished)
        rows.append(row)
    return rows


def pooled(rows: Sequence[Row], by: Sequence[str]) -> list[Row]:
    """The arms with the same options of these axes, as one row each."""
    groups: dict[tuple[tuple[str, str], ...], Row] = {}
    for row in rows:
        options = {axis: row.options[axis] for axis in by if axis in row.options}
        group = groups.get((*options.items(),), Row(",".join(options.values()), options))
        groups[(*options.items(),)] = Row(
            group.arm,
            options,
            [*group.cells, *row.cells],
            [*group.metrics, *row.metrics],
            group.planned + row.planned,
            group.diverged + row.diverged,
            row.metric,
        )
    return [*groups.values()]
