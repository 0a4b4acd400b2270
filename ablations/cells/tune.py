"""Tuning: what each arm is tried with, on seeds and a split of their own, and what is chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from layerzoo.spec import Config, SpecError, suggest
from layerzoo.support.field_docs import read_config

from .axes import Axis, Override, read_axes
from .cell import Cell, Seed
from .schema import read_seeds
from .source import Source

RunMetrics = Mapping[str, Mapping[str, Any] | str]
"""Of runs, by `Cell.path`; why there are none of one that diverged, or failed for good."""


class Tune(Config):
    """Tries every arm with the product of some axes, and keeps the best options."""

    axes: dict[str, Any]
    """The tuned options, in the forms of the grid's axes, are tried in all combinations."""
    seeds: tuple[int | dict[str, int], ...]
    """The tuning runs have these seeds. None of them may be one of the grid's."""
    metric: str = "loss/held_out"
    """The best options are chosen by this figure of the validation split, as a mean over the
    seeds."""
    mode: Literal["min", "max"] = "min"
    """The smallest (min) or the largest (max) figure is best."""
    budget: int | None = None
    """A tuning run has this many updates; null is the grid's budget."""

    def check(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise SpecError(f"budget: must be at least 1, got {self.budget}")


@dataclass(frozen=True)
class Tuning:
    """A `Tune` as read."""

    source: Source
    fields: Tune
    axes: dict[str, Axis]
    seeds: tuple[Seed, ...]

    @property
    def options(self) -> list[dict[str, str]]:
        """Tuning axis -> option, in order."""
        rows = itertools.product(*(axis.options for axis in self.axes.values()))
        return [dict(zip(self.axes, row, strict=True)) for row in rows]

    @property
    def every_override(self) -> list[Override]:
        options = itertools.chain(*(axis.options.values() for axis in self.axes.values()))
        return [*itertools.chain(*(option.overrides for option in options))]

    def overrides(self, options: Mapping[str, str]) -> tuple[Override, ...]:
        parts = (self.axes[axis].options[label].overrides for axis, label in options.items())
        return tuple(itertools.chain(*parts))

    def edges(self, options: Mapping[str, str]) -> tuple[str, ...]:
        """The axes of three numbers or more on which this is the least or the greatest."""
        out = []
        for name, label in options.items():
            numbers = self.axes[name].numbers
            at = [*self.axes[name].options].index(label)
            if len(numbers) > 2 and numbers[at] in (min(numbers), max(numbers)):
                out.append(name)
        return tuple(out)


@dataclass(frozen=True)
class Trial:
    """One of the options that an arm was tried with.

    mean: of the metric over the seeds that have it; None if none has. seeds: how many have.
    lost: seed -> why it has none: it diverged, or failed.
    """

    options: dict[str, str]
    mean: float | None
    seeds: int
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What an arm was tried with, in order, and what was chosen.

    best: the trial with the fewest lost seeds, then with the best mean, then the first; None if
        every run of the arm diverged or failed.
    edges: numeric tuning axes whose best option is their first or last number. A wider axis may
        hold a better one.
    """

    best: Trial | None
    edges: tuple[str, ...] = ()
    trials: list[Trial] = field(default_factory=list)


def choose_options(
    tuning: Tuning, cells: Sequence[Cell], figures: RunMetrics
) -> dict[str, Choice]:
    """What the tuning runs say is best for each arm.

    Args:
        cells: the tuning runs.
        figures: the figures of all runs that ended; of a run that failed, why.

    Returns:
        arm -> choice, of the arms all of whose tuning runs ended.

    Raises:
        SpecError: the figures of a run have no such metric.
    """
    runs: dict[str, dict[tuple[str, ...], list[Cell]]] = {}
    for cell in cells:
        tried = runs.setdefault(cell.arm, {})
        tried.setdefault((*cell.tuned.values(),), []).append(cell)
    return {
        arm: _choice(tuning, [_trial(tuning, mine, figures) for mine in tried.values()])
        for arm, tried in runs.items()
        if all(cell.path in figures for mine in tried.values() for cell in mine)
    }


def _trial(tuning: Tuning, cells: Sequence[Cell], figures: RunMetrics) -> Trial:
    values, lost, metric = list[float](), dict[str, str](), tuning.fields.metric
    for cell in cells:
        run = figures[cell.path]
        if isinstance(run, str):
            lost[str(cell.seed)] = run
            continue
        if metric not in run:
            message = f"{cell.path} measured no '{metric}'; {suggest(metric, run)}"
            raise tuning.source.error(("tune", "metric"), message)
        value = math.nan if run[metric] is None else float(run[metric])  # JSON has no nan
        if math.isfinite(value):
            values.append(value)
        else:
            lost[str(cell.seed)] = f"{metric} is {value}"
    mean = sum(values) / len(values) if values else None
    return Trial(dict(cells[0].tuned), mean, len(values), lost)


def _choice(tuning: Tuning, trials: list[Trial]) -> Choice:
    sign = 1 if tuning.fields.mode == "min" else -1
    finished = [trial for trial in trials if trial.mean is not None]
    # Without those that are lost, a mean would be of the luckier seeds.
    best = min(finished, key=lambda t: (-t.seeds, sign * (t.mean or 0.0)), default=None)
    return Choice(best, tuning.edges(best.options) if best else (), trials)


def read_tuning(source: Source, axes: Mapping[str, Axis], reported: Sequence[Seed]) -> Tuning:
    """The field `tune`, of a grid with these axes and seeds.

    Raises:
        SpecError: a tuning run would have an initialisation or the data of a reported one.
    """
    with source.locating("tune"):
        fields: Tune = read_config(Tune, source.value("tune"))
    tuning = Tuning(
        source, fields, read_axes(source, "tune", "axes"), read_seeds(source, "tune", "seeds")
    )
    for name in tuning.axes:
        if name in axes:
            raise source.error(("tune", "axes", name), "is an axis of the grid; tune another")
    for n, seed in enumerate(tuning.seeds):
        for part in Seed._fields:
            if getattr(seed, part) in {getattr(other, part) for other in reported}:
                raise source.error(
                    ("tune", "seeds", str(n)),
                    f"{seed}: the grid's seeds have its {part} too; runs that are reported must "
                    f"not choose; take another",
                )
    return tuning
