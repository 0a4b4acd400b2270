"""What a grid found, computed once for its tables, plots and files, and sentences about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzoo.spec import SpecError, suggest

from ..cells.confounds import Confounds
from ..cells.grid import shipped_grids
from ..cells.source import Source
from ..running.folder import ENDED
from ..running.pace import duration_text
from .arm_rows import ArmRow, rows_by_arm, rows_by_axes
from .comparisons import (
    MeasuredContrast,
    Verdict,
    judge_claims,
    measure_contrasts,
    measured_confounds,
)
from .results import GRID_FILE, GridResults, read_results
from .scaling import FittedLaw, fit_laws
from .statistics import mean_interval, window_bound


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


def summary_line(findings: Findings) -> str:
    """Cells by state, arms, seeds, updates, tasks, device, versions, time: one line."""
    results = findings.results
    finished = [cell for cell in results.cells if cell.state == "finished"]
    records = [results.record(cell) for cell in finished]
    counts = Counter(
        cell.state if cell.state in ("finished", "diverged", "failed") else "missing"
        for cell in results.cells
    )
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    seeds = ", ".join(dict.fromkeys(str(cell.seed) for cell in results.cells))
    configs = [results.config(row.cells[0]) for row in findings.rows if row.cells]
    tasks = dict.fromkeys(str(c["data"]["class_path"]).rpartition(".")[2] for c in configs)
    updates = dict.fromkeys(str(cell.metrics.get("steps")) for cell in finished)
    seconds = sum(record.get("seconds", 0.0) for record in records)
    parts = [
        f"{len(results.cells)} cells ({states}): {len(findings.rows)} arms, seeds {seeds}",
        f"{' or '.join(updates)} updates each" if updates else "",
        f"task {', '.join(tasks)}" if tasks else "",
        _distinct(records, "device"),
        ", ".join(
            f"{what} {v}" for what in ("layerzoo", "torch") if (v := _versions(records, what))
        ),
        f"commit {commit}" if (commit := _versions(records, "commit")) else "",
        f"{duration_text(seconds)} of training in all" if seconds else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def rerun_command(results: GridResults) -> str:
    """What runs the grid again: by its name if it ships as it is here, else from its copy in the
    folder of results."""
    size = results.fields.size
    shipped = shipped_grids().get(results.fields.name)
    if shipped is not None and Source(shipped, size).copy == (results.root / GRID_FILE).read_text(
        encoding="utf-8"
    ):
        option = f" --size {size}" if size else ""
        return f"layerzoo ablate run {results.fields.name}{option}"
    return f"layerzoo ablate run {GRID_FILE}"


def doubts(findings: Findings) -> list[str]:
    """What the cells have not in common, and figures that none has."""
    results = findings.results
    cells = [cell for row in findings.rows for cell in row.cells]
    records = [results.record(cell) for cell in cells]
    lines = []
    for what in ("layerzoo", "commit", "torch"):
        found = {str(record.get("versions", {}).get(what)) for record in records}
        if len(found) > 1:
            lines.append(f"warning: cells ran with different {what}: {', '.join(sorted(found))}")
    known = {name: None for cell in cells for name in cell.metrics}
    for name in (results.report.metric, *results.report.columns):
        if name and cells and name not in known:
            lines.append(f"warning: no cell measured '{name}'; {suggest(name, known)}")
    return lines


def missing_results(findings: Findings) -> str | None:
    """What is missing, if the grid has not ended, or parts of it never will."""
    results = findings.results
    left = sum(cell.state not in ENDED for cell in results.cells)
    parts = [f"{left} of {len(results.cells)} cells have no result yet"] if left else []
    if waiting := results.waiting:
        parts.append(f"{', '.join(waiting)} wait for their tuning")
    if never := [arm for arm in results.without_cells if arm not in waiting]:
        parts.append(f"{', '.join(never)} have no cells: every tuning run diverged or failed")
    if failed := sum(trial.state == "failed" for trial in results.trials):
        parts.append(f"{failed} of {len(results.trials)} tuning runs failed")
    return f"Partial: {'; '.join(parts)}." if parts else None


def _distinct(records: Sequence[dict[str, Any]], name: str) -> str:
    return ", ".join(sorted({str(r[name]) for r in records if r.get(name) is not None}))


def _versions(records: Sequence[dict[str, Any]], what: str) -> str:
    found = {str(v) for r in records if (v := r.get("versions", {}).get(what)) is not None}
    return ", ".join(sorted(re.sub(r"^(\w{12})\w{28}(?=\+?$)", r"\1", v) for v in found))
