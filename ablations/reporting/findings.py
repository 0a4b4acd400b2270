"""What a grid found: all that its tables, figures and files show, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerzoo.spec import SpecError

from ..cells.confounds import Confounds
from .confounds import measured_confounds
from .contrasts import MeasuredContrast, measure_contrasts
from .laws import FittedLaw, fit_laws
from .results import GridResults, read_results
from .rows import ArmRow, rows_by_arm, rows_by_axes
from .statistics import mean_interval, window_bound
from .verdicts import Verdict, judge_claims


@dataclass(frozen=True)
class Findings:
    """rows: by arm. groups: by the axes that the grid groups by. contrasts: by figure, the
    headline first. confounds: what else differs. laws: the scaling laws, fitted."""

    results: GridResults
    rows: list[ArmRow]
    groups: list[ArmRow]
    contrasts: dict[str, list[MeasuredContrast]]
    confounds: Confounds
    laws: list[FittedLaw]
    verdicts: list[Verdict]

    @property
    def headline(self) -> str:
        """What the headline is called: accuracy, if the tasks of the arms have different ones."""
        names = {row.headline for row in self.rows if row.scores} or {self.rows[0].headline}
        return names.pop() if len(names) == 1 else "accuracy/of each task"

    @property
    def reach(self) -> int | None:
        """Of the window arm, in tokens; None if the grid names none."""
        cell = next((cell for row in self.rows for cell in row.cells), None)
        config = self.results.config(cell) if cell else {"data": {}}
        return config["data"].get("init_args", {}).get("reach")


def read_findings(root: Path) -> Findings:
    """What is in a grid's folder of results.

    Raises:
        SpecError: it is no grid's folder, or no cell is reported yet.
    """
    results = read_results(root)
    if not results.cells:
        fault = "is tuned yet" if results.waiting or not results.trials else "could be tuned"
        raise SpecError(f"{root}: no arm {fault}; see `layerzoo ablate status {root}`")
    metric = results.report.metric
    rows = rows_by_arm(results.cells, metric)
    by = results.report.by
    found = Findings(
        results=results,
        rows=rows,
        groups=rows_by_axes(results.cells, by, metric) if by else [],
        contrasts={},
        confounds=measured_confounds(results, rows),
        laws=fit_laws(results),
        verdicts=judge_claims(results.claims, rows),
    )
    if results.report.contrasts:
        found.contrasts[found.headline] = measure_contrasts(results, metric)
        for name in results.report.columns:
            found.contrasts[name] = measure_contrasts(results, name)
    return found


def shared_window_bound(rows: Sequence[ArmRow]) -> tuple[float, float] | None:
    """The window's bound on accuracy and its standard error, if the arms have one ceiling,
    below 1."""
    shown = [
        (cell.seed, cell.metrics)
        for row in rows
        for cell in row.cells
        if cell.metrics.get("chance") and "recall/ceiling" in cell.metrics
    ]
    ceilings = {(seed, m["recall/ceiling"]) for seed, m in shown}
    if not shown or len(ceilings) > len({seed for seed, _ in shown}):  # arms differ in reach
        return None
    ceiling = mean_interval([m["recall/ceiling"] for _, m in shown]).mean
    if ceiling == 1:
        return None
    return window_bound(ceiling, shown[0][1]["chance"], shown[0][1]["recall/queries"])
