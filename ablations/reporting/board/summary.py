"""A grid's summary in TensorBoard: a run of margins for each arm, and one of text and images.

A margin chart gives every run a colour of its own, but has one for all series of a run. So each
arm is a run, with the same tags as the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from ..results import Result, Results
from .margins import margins, read_curves
from .measures import measures

FOLDER = "summary"
"""In the grid's folder, and so the name of the run."""
SUFFIX = ".summary"
GROUP = "all arms"
"""Of the text and the images: the first on their pages."""
ARMS = "mean and 95% t interval over seeds"
MOST = 7
"""Arms of one chart, which has so many colours. If there are more, each option of the first axis
has charts of its own."""


class Line(NamedTuple):
    """A run's margins: the charts that they are in, with a part of their tags that tells these
    from others, and the cells that they are of."""

    run: str
    charts: str
    part: str
    cells: list[Result]


def write_summary_run(results: Results, figures: Mapping[str, Figure], text: str) -> None:
    """Write the summary anew; the earlier one is removed.

    text: markdown.
    """
    root = results.root / FOLDER
    for stale in root.rglob(f"events.*{SUFFIX}"):
        stale.unlink(missing_ok=True)
    names = measures(results)
    curves = {cell.path: read_curves(results.root / cell.path, names) for cell in results.cells}
    layout: dict[str, dict[str, list[Any]]] = {}
    for line in _lines(results):
        found = {name: margins(line.cells, curves, name) for name in names}
        found = {name: steps for name, steps in found.items() if steps}
        if not found:
            continue
        with SummaryWriter(str(root / line.run), filename_suffix=SUFFIX) as run:
            for name, steps in found.items():
                tags = _tags(f"{line.part}{name}")
                for step, margin in steps.items():
                    for tag, value in zip(tags, margin, strict=True):
                        run.add_scalar(tag, value, step)
                layout.setdefault(line.charts, {})[name] = ["Margin", [*tags]]
    with SummaryWriter(str(root), filename_suffix=SUFFIX) as run:
        run.add_text(f"{GROUP}/results", text)
        for name, figure in figures.items():
            run.add_figure(f"{GROUP}/{name}", figure)
        if layout:
            # The page shows the charts of a category from the last to the first.
            shown = {
                title: {name: charts[name] for name in reversed(names) if name in charts}
                for title, charts in layout.items()
            }
            run.add_custom_scalars(shown)


def _lines(results: Results) -> list[Line]:
    arms: dict[str, list[Result]] = {}
    groups: dict[str, list[Result]] = {}
    by = results.report.by
    for cell in results.cells:
        arms.setdefault(cell.arm, []).append(cell)
        options = (cell.options[axis] for axis in by if axis in cell.options)
        groups.setdefault(",".join(options), []).append(cell)
    lines = []
    if by:
        part = f"by_{','.join(by)}"
        charts = f"{ARMS}, by {', '.join(by)}"
        lines += [Line(f"{part}/{n}", charts, f"{part}/", cells) for n, cells in groups.items()]
    axis = _axis([cells[0].options for cells in arms.values()])
    for arm, cells in arms.items():
        option = cells[0].options[axis] if axis else ""
        charts = f"{ARMS}, {axis}: {option}" if axis else ARMS
        lines.append(Line(arm, charts, f"{option}/" if axis else "", cells))
    return lines


def _axis(arms: Sequence[Mapping[str, str]]) -> str | None:
    """Whose options have charts of their own, if the arms are too many for one."""
    several = (
        axis
        for axis in arms[0]
        if all(axis in arm for arm in arms) and len({arm[axis] for arm in arms}) > 1
    )
    return next(several, None) if len(arms) > MOST else None


def _tags(name: str) -> tuple[str, str, str]:
    """Of mean, lower and upper limit. Where tags are listed, the means stand together, and first.
    A margin chart draws nothing of a tag with a parenthesis."""
    return f"mean/{name}", f"mean_interval/{name}/lower", f"mean_interval/{name}/upper"
