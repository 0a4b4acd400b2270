"""An arm of a grid, as its finished cells measured it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cells.cell import Seed
from .results import CellResult
from .statistics import Estimate, mean_interval, mean_of

_SHARE = re.compile(
    r"(accuracy(_\w+)?|errors|continual(_matrix)?|recall_\w+)/.*"
    r"|recall/(?!queries|half_life).*"
    r"|chance"
)


def is_share(name: str) -> bool:
    """Whether a figure is one of all answers, or a difference of such; they are shown in %."""
    return _SHARE.fullmatch(name) is not None


def is_accuracy(name: str) -> bool:
    """Whether a figure is the share of right answers."""
    return is_share(name) and not name.startswith("errors/")


ACCURACIES = ("recall/accuracy", "accuracy/all")
"""What a task's headline is, the first that it has."""


def metric_of(metrics: Mapping[str, Any], name: str | None) -> float | None:
    """A figure of a cell; None is named for the accuracy that its task has."""
    names = ACCURACIES if name is None else (name,)
    return next((metrics[n] for n in names if metrics.get(n) is not None), None)


@dataclass(frozen=True)
class ArmRow:
    """An arm, or several, over seeds.

    cells: of the finished ones. planned: how many there are in all. diverged, failed: how many of
    them did. metric: the headline, where it is not an accuracy.
    """

    arm: str
    options: dict[str, str]
    cells: list[CellResult] = field(default_factory=list)
    planned: int = 0
    diverged: int = 0
    failed: int = 0
    metric: str | None = None

    def by_seed(self, name: str | None) -> dict[Seed, float]:
        """A figure, None for the accuracy that each task has, at each seed that has it: of several
        arms their mean, so that seeds, which are drawn, are counted, and arms, which are chosen,
        are not."""
        found: dict[Seed, list[float]] = {}
        for cell in self.cells:
            if (value := metric_of(cell.metrics, name)) is not None:
                found.setdefault(cell.seed, []).append(value)
        return {seed: mean_of(values) for seed, values in found.items()}

    def values(self, name: str | None) -> list[float]:
        return [*self.by_seed(name).values()]

    @property
    def scores(self) -> list[float]:
        """The headline at each seed."""
        return self.values(self.metric)

    @property
    def headline(self) -> str:
        """The name of the figure that counts: the grid's, or the accuracy that the task has."""
        return self.metric or next(
            (name for name in ACCURACIES if self.values(name)), ACCURACIES[0]
        )

    def estimate(self, name: str | None) -> Estimate:
        return mean_interval(self.values(name))

    def curve(self, family: str) -> dict[int, Estimate]:
        """Figures `family/<number>` by their numbers."""
        names = {n for c in self.cells for n in c.metrics if re.fullmatch(rf"{family}/\d+", n)}
        numbers = sorted(int(name.rpartition("/")[2]) for name in names)
        return {n: self.estimate(f"{family}/{n}") for n in numbers}


def rows_by_arm(cells: Sequence[CellResult], metric: str | None = None) -> list[ArmRow]:
    """The cells by arm, in the grid's order."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(cell.arm, []).append(cell)
    return [_arm_row(arm, mine[0].options, mine, metric) for arm, mine in groups.items()]


def rows_by_axes(
    cells: Sequence[CellResult], by: Sequence[str], metric: str | None = None
) -> list[ArmRow]:
    """The cells with the same options of these axes, as one row each. At a seed that not all of
    its arms have, a row has nothing: the mean would be of other arms than at the others."""
    groups: dict[str, tuple[dict[str, str], list[CellResult]]] = {}
    for cell in cells:
        options = {axis: cell.options[axis] for axis in by if axis in cell.options}
        groups.setdefault(",".join(options.values()), (options, []))[1].append(cell)
    return [_arm_row(name, *group, metric, whole=True) for name, group in groups.items()]


def _arm_row(
    name: str,
    options: Mapping[str, str],
    cells: Sequence[CellResult],
    metric: str | None,
    whole: bool = False,
) -> ArmRow:
    lacking = {cell.seed for cell in cells if not cell.metrics} if whole else set()
    return ArmRow(
        name,
        {**options},
        [cell for cell in cells if cell.metrics and cell.seed not in lacking],
        len(cells),
        sum(cell.state == "diverged" for cell in cells),
        sum(cell.state == "failed" for cell in cells),
        metric,
    )


def differences_by_seed(
    cells: Sequence[CellResult], pairs: Sequence[tuple[str, str]], name: str | None
) -> list[float]:
    """Differences of a figure, first arm minus second, one at each seed that all arms have.

    Args:
        name: the figure; None is the accuracy that each task has.
        pairs: of arms; over several pairs the difference is their mean.
    """
    at = {(cell.arm, cell.seed): metric_of(cell.metrics, name) for cell in cells}
    out = []
    for seed in dict.fromkeys(cell.seed for cell in cells):
        both = [(at.get((a, seed)), at.get((b, seed))) for a, b in pairs]
        found = [a - b for a, b in both if a is not None and b is not None]
        if len(found) == len(pairs):
            out.append(mean_of(found))
    return out
