"""Writes the files of a grid's report, and prints its tables."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from layerzoo.spec import SpecError
from layerzoo.support.json_files import write_json

from .arm_rows import is_accuracy
from .board.hparams import write_hparams
from .board.summary_run import write_summary_run
from .comparisons import MeasuredContrast, verdict_trees
from .findings import (
    Findings,
    doubts,
    missing_results,
    read_findings,
    rerun_command,
    shared_window_bound,
)
from .formats import html_page
from .page import markdown_page, results_notes, scaling_notes
from .plots import ReportPlot, figures_by_name, report_plots
from .plots.canvas import save_svg
from .results import CellResult, GridResults
from .scaling import FittedLaw
from .statistics import Estimate, success_rate
from .tables import claims_table, confounds_table, contrasts_table, results_table, scaling_table

REPORT_FOLDER = "report"
"""In the grid's folder: its report."""


def compare(root: Path, console: Console, to: Path | None = None) -> bool:
    """Write and print it all; False if all cells have ended and a claim does not hold.

    Args:
        to: the folder of the report, default `report` in the grid's.
    """
    findings, folder = read_findings(root), to or root / REPORT_FOLDER
    try:
        drawn = report_plots(findings)
        files = write_report(findings, drawn, folder)
    except OSError as error:
        raise SpecError(f"{folder}: {error.strerror}; give another --to") from None
    write_hparams([findings.results], root)
    write_summary_run(findings.results, figures_by_name(drawn), markdown_page(findings, {}))
    _print_findings(findings, console)
    console.print(f"report:      {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    console.print(f"tensorboard: layerzoo ablate board {root}", markup=False, soft_wrap=True)
    return not findings.results.ended or all(verdict.holds for verdict in findings.verdicts)


def write_report(findings: Findings, drawn: Mapping[str, ReportPlot], folder: Path) -> list[Path]:
    """Write the report's files anew, and remove the figures of an earlier one that are in it no
    more.

    Returns: the files, but for the figures.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    text_file, html_file = folder / "report.md", folder / "report.html"
    before = text_file.read_text(encoding="utf-8") if text_file.is_file() else ""
    for name, picture in drawn.items():
        save_svg(picture.figure, folder / "figures" / f"{name}.svg")
    for stale in {*re.findall(r"\]\(figures/([\w.=-]+)\.svg\)", before)} - {*drawn}:
        (folder / "figures" / f"{stale}.svg").unlink(missing_ok=True)
    text = markdown_page(findings, drawn)
    text_file.write_text(text, encoding="utf-8")
    svgs = {f"figures/{name}.svg": (folder / "figures" / f"{name}.svg") for name in drawn}
    inside = {name: path.read_text(encoding="utf-8") for name, path in svgs.items()}
    html_file.write_text(html_page(findings.results.name, text, inside), encoding="utf-8")
    write_json(folder / "summary.json", summary_tree(findings))
    return [
        text_file,
        html_file,
        folder / "summary.json",
        *write_cell_table(findings.results, folder),
    ]


def _print_findings(findings: Findings, console: Console) -> None:
    results = findings.results
    console.print(results_table(findings, findings.rows, results.name))
    if findings.groups:
        name = f"{results.name} by {', '.join(results.report.by)}"
        console.print(results_table(findings, findings.groups, name))
    missing = missing_results(findings)
    for line in (*results_notes(findings), *doubts(findings), *([missing] if missing else [])):
        console.print(line, markup=False)
    for name, family in findings.contrasts.items():
        console.print(contrasts_table(name, family))
    if table := confounds_table(findings):
        console.print(table)
    for line in findings.confounds.notes:
        console.print(line, markup=False)
    for line in findings.confounds.warnings:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)
    for law in results.report.scaling:
        console.print(scaling_table([fit for fit in findings.laws if fit.law is law]))
    for line in (line for fit in findings.laws for line in scaling_notes(fit)):
        console.print(line, markup=False)
    if findings.verdicts:
        console.print(claims_table(findings.verdicts))


def write_cell_table(results: GridResults, folder: Path) -> list[Path]:
    """Write the cells as CSV, and as Parquet if pyarrow is there. Floats are in full precision; in
    CSV nan and inf are words, and what there is not is empty."""
    lines = _cell_lines(results)
    frame = pd.DataFrame(lines)
    csv, parquet = folder / "results.csv", folder / "results.parquet"
    words = [{name: _nan_as_word(value) for name, value in line.items()} for line in lines]
    told = {name: pd.array([line[name] for line in words], dtype=object) for name in frame}
    pd.DataFrame(told).to_csv(csv, index=False, lineterminator="\n")
    if importlib.util.find_spec("pyarrow") is None:
        return [csv]
    frame.to_parquet(parquet, index=False)
    return [csv, parquet]


def _nan_as_word(value: Any) -> Any:
    """nan as a word: pandas would write nothing."""
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def _cell_lines(results: GridResults) -> list[dict[str, Any]]:
    """All with the same columns: axes in the grid's order, figures by name."""
    axes = [*dict.fromkeys(axis for arm in results.arms.values() for axis in arm)]
    tuned = [*dict.fromkeys(axis for cell in results.cells for axis in cell.tuned)]
    names = sorted({name for cell in results.cells for name in cell.metrics})
    return [_cell_line(cell, axes, tuned, names) for cell in results.cells]


def _cell_line(
    cell: CellResult, axes: list[str], tuned: list[str], names: list[str]
) -> dict[str, Any]:
    return {
        "arm": cell.arm,
        **{f"axis:{axis}": cell.options.get(axis) for axis in axes},
        "seed_init": cell.seed.init,
        "seed_data": cell.seed.data,
        "state": cell.state,
        "path": cell.path,
        **{f"tuned:{axis}": cell.tuned.get(axis) for axis in tuned},
        "matched:deviation": cell.matched.get("deviation"),
        **{name: cell.metrics.get(name) for name in names},
    }


SUMMARY_METRICS = (
    "recall/accuracy",
    "accuracy/all",
    "recall/beyond_window",
    "recall/ceiling",
    "loss/held_out",
)


def summary_tree(findings: Findings) -> dict[str, Any]:
    """Every arm's estimates, every cell's metrics, contrasts, fits and claims; null where nothing
    is. A figure that is not finite stays what it is."""
    results = findings.results
    wanted = (*SUMMARY_METRICS, results.report.metric, *results.report.columns)
    names = [*dict.fromkeys(name for name in wanted if name)]
    bound = shared_window_bound(findings.rows)
    arms = [
        {
            "arm": row.arm,
            "options": row.options,
            "seeds": [str(cell.seed) for cell in row.cells],
            "diverged": row.diverged,
            "failed": row.failed,
            "tuned": row.cells[0].tuned if row.cells else {},
            "matched": row.cells[0].matched if row.cells else {},
            **{name: _estimate_tree(row.estimate(name)) for name in names if row.values(name)},
            "success_rate": success_rate(row.scores)
            if row.scores and is_accuracy(row.headline)
            else None,
            "cells": [cell.metrics for cell in row.cells],
            "folders": [cell.path for cell in row.cells],
        }
        for row in findings.rows
    ]
    return {
        "grid": results.fields.to_fields(),
        "command": rerun_command(results),
        "window_bound": {"mean": bound[0], "standard_error": bound[1]} if bound else None,
        "claims": verdict_trees(findings.verdicts),
        "contrasts": {
            name: [_contrast_tree(each) for each in family]
            for name, family in findings.contrasts.items()
        },
        "confounds": asdict(findings.confounds),
        "scaling": [_fit_tree(fit) for fit in findings.laws],
        "arms": arms,
    }


def _estimate_tree(found: Estimate) -> dict[str, float | None]:
    return {"mean": found.mean, "half": _none_if_nan(found.half)}


def _none_if_nan(x: float) -> float | None:
    """Of what is nan where there is none."""
    return None if math.isnan(x) else x


def _contrast_tree(each: MeasuredContrast) -> dict[str, Any]:
    found = each.difference
    return {
        **asdict(each.contrast),
        **found._asdict(),
        "mean": found.mean if found.pairs else None,
        "half": _none_if_nan(found.half),
        "holm": each.holm,
        "words": each.words,
    }


def _fit_tree(fit: FittedLaw) -> dict[str, Any]:
    scaling = fit.scaling
    return {
        **fit.law.to_fields(),
        "group": fit.group,
        "cells": len(fit.cells),
        "left_out": fit.left_out,
        "refused": scaling.refused if scaling else "no cell to fit",
        "decades": [_none_if_nan(x) for x in scaling.decades] if scaling else None,
        "best": scaling.best.name if scaling and scaling.forms else None,
        "forms": {
            name: {"formula": form.formula, "parameters": form.parameters, "miss": form.miss}
            for name, form in (scaling.forms if scaling else {}).items()
        },
    }
