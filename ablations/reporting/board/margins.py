"""Learning curves over seeds: mean and 95% t interval, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ...cells.cell import Seed
from ..results import CellResult
from ..statistics import mean_interval, mean_of

StepCurve = dict[int, float]
"""A figure by the step of its measurement."""


class SeedInterval(NamedTuple):
    """Of one value, all three are that value."""

    mean: float
    lower: float
    upper: float


def read_curves(folder: Path, names: Sequence[str]) -> dict[str, StepCurve]:
    """The figures of the validation split that a cell has logged so far."""
    if not any(folder.glob("events.*")):  # it has not begun
        return {}
    keep_all = {"scalars": 0, "images": 1, "tensors": 1}
    events = EventAccumulator(str(folder), size_guidance=keep_all).Reload()
    return {
        name: {e.step: e.value for e in events.Scalars(name)}
        for name in names
        if name in events.Tags()["scalars"]
    }


def seed_intervals(
    cells: Sequence[CellResult], curves: Mapping[str, Mapping[str, StepCurve]], name: str
) -> dict[int, SeedInterval]:
    """A figure's interval over seeds at every step, from the seeds that have it. There is none
    at a step where one of them is not finite: it would be of the others alone.

    cells: of one arm, or of several: then a seed's value is their mean, and it counts only
    where all of them have one. curves: those of each cell, by its path.
    """
    arms = len({cell.arm for cell in cells})
    found: dict[int, dict[Seed, list[float]]] = {}
    for cell in cells:
        for step, value in curves.get(cell.path, {}).get(name, {}).items():
            found.setdefault(step, {}).setdefault(cell.seed, []).append(value)
    out = {}
    for step, seeds in sorted(found.items()):
        values = [mean_of(of_seed) for of_seed in seeds.values() if len(of_seed) == arms]
        if values and all(map(math.isfinite, values)):
            mean, half, _ = mean_interval(values)
            half = 0.0 if math.isnan(half) else half
            out[step] = SeedInterval(mean, mean - half, mean + half)
    return out
