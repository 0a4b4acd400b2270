"""A grid's summary in TensorBoard: seed intervals by step for each arm, text and images.

A margin chart gives every run a colour of its own, but has one for all series of a run. So each
arm is a run, with the same tags as the others. One more run has the text and the images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ...cells.cell import Seed
from ..results import CellResult, GridResults
from ..statistics import mean_interval, mean_of
from .hparams import compared_metrics

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


SUMMARY_FOLDER = "summary"
"""In the grid's folder, and so the name of the run."""
SUMMARY_SUFFIX = ".summary"
ALL_ARMS = "all arms"
"""Of the text and the images: the first on their pages."""
CHARTS_TITLE = "mean and 95% t interval over seeds"
ARMS_PER_CHART = 7
"""Arms of one chart, which has so many colours. If there are more, each option of the first axis
has charts of its own."""


class SummaryRun(NamedTuple):
    """A run's margins: the charts that they are in, with a part of their tags that tells these
    from others, and the cells that they are of."""

    run: str
    charts: str
    part: str
    cells: list[CellResult]


def write_summary_run(results: GridResults, figures: Mapping[str, Figure], text: str) -> None:
    """Write the summary anew; the earlier one is removed.

    text: markdown.
    """
    root = results.root / SUMMARY_FOLDER
    for stale in root.rglob(f"events.*{SUMMARY_SUFFIX}"):
        stale.unlink(missing_ok=True)
    names = compared_metrics(results)
    curves = {cell.path: read_curves(results.root / cell.path, names) for cell in results.cells}
    layout: dict[str, dict[str, list[Any]]] = {}
    for line in _summary_runs(results):
        found = {name: seed_intervals(line.cells, curves, name) for name in names}
        found = {name: steps for name, steps in found.items() if steps}
        if not found:
            continue
        with SummaryWriter(str(root / line.run), filename_suffix=SUMMARY_SUFFIX) as run:
            for name, steps in found.items():
                tags = _margin_tags(f"{line.part}{name}")
                for step, margin in steps.items():
                    for tag, value in zip(tags, margin, strict=True):
                        run.add_scalar(tag, value, step)
                layout.setdefault(line.charts, {})[name] = ["Margin", [*tags]]
    with SummaryWriter(str(root), filename_suffix=SUMMARY_SUFFIX) as run:
        run.add_text(f"{ALL_ARMS}/results", text)
        for name, figure in figures.items():
            run.add_figure(f"{ALL_ARMS}/{name}", figure)
        if layout:
            # The page shows the charts of a category from the last to the first.
            shown = {
                title: {name: charts[name] for name in reversed(names) if name in charts}
                for title, charts in layout.items()
            }
            run.add_custom_scalars(shown)


def _summary_runs(results: GridResults) -> list[SummaryRun]:
    arms: dict[str, list[CellResult]] = {}
    groups: dict[str, list[CellResult]] = {}
    by = results.report.by
    for cell in results.cells:
        arms.setdefault(cell.arm, []).append(cell)
        options = (cell.options[axis] for axis in by if axis in cell.options)
        groups.setdefault(",".join(options), []).append(cell)
    lines = []
    if by:
        part = f"by_{','.join(by)}"
        charts = f"{CHARTS_TITLE}, by {', '.join(by)}"
        lines += [
            SummaryRun(f"{part}/{n}", charts, f"{part}/", cells) for n, cells in groups.items()
        ]
    axis = _charts_axis([cells[0].options for cells in arms.values()])
    for arm, cells in arms.items():
        option = cells[0].options[axis] if axis else ""
        charts = f"{CHARTS_TITLE}, {axis}: {option}" if axis else CHARTS_TITLE
        lines.append(SummaryRun(arm, charts, f"{option}/" if axis else "", cells))
    return lines


def _charts_axis(arms: Sequence[Mapping[str, str]]) -> str | None:
    """Whose options have charts of their own, if the arms are too many for one."""
    several = (
        axis
        for axis in arms[0]
        if all(axis in arm for arm in arms) and len({arm[axis] for arm in arms}) > 1
    )
    return next(several, None) if len(arms) > ARMS_PER_CHART else None


def _margin_tags(name: str) -> tuple[str, str, str]:
    """Of mean, lower and upper limit. Where tags are listed, the means stand together, and first.
    A margin chart draws nothing of a tag with a parenthesis."""
    return f"mean/{name}", f"mean_interval/{name}/lower", f"mean_interval/{name}/upper"
