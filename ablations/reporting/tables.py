"""The tables of a grid's report, for the terminal and for markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..running.folder import reason_of
from .arm_rows import ArmRow, is_accuracy, is_share
from .comparisons import MeasuredContrast, Verdict
from .findings import Findings
from .formats import NOTHING, column_head, estimate_text, mean_text, p_text
from .scaling import FittedLaw
from .statistics import SUCCESS_ACCURACY, Estimate, success_rate

WINDOW_METRICS = ("recall/beyond_window", "recall/ceiling", "chance")
COLUMN_HEADS = {
    "recall/beyond_window": "beyond\nwindow (%)",
    "recall/ceiling": "ceiling\n(%)",
    "chance": "chance\n(%)",
    "loss/held_out": "loss",
    "state_bytes": "state\nbytes",
}


def new_table(title: str, *heads: str) -> Table:
    """Its first column is a name."""
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    for n, name in enumerate(heads):
        out.add_column(name, justify="right" if n else "left", no_wrap=True)
    return out


def results_table(findings: Findings, rows: Sequence[ArmRow], name: str) -> Table:
    """Mean and 95% t interval over seeds, a line a row; columns that say nothing are left out."""
    headline = findings.headline
    columns = {
        "cells": [_counts(row) for row in rows],
        column_head(headline): [estimate_text(headline, row.estimate(row.metric)) for row in rows],
    }
    if is_accuracy(headline) and rows is findings.rows:
        columns[f"≥{SUCCESS_ACCURACY:.0%}"] = [_successes(row) for row in rows]
    others = (*WINDOW_METRICS, *findings.results.report.columns, "loss/held_out")
    for figure in dict.fromkeys(others):
        if figure != headline:
            alone = figure in ("recall/ceiling", "chance")
            estimates = [row.estimate(figure) for row in rows]
            if alone:
                estimates = [e._replace(half=float("nan")) for e in estimates]
            columns[COLUMN_HEADS.get(figure, column_head(figure))] = [
                estimate_text(figure, e) for e in estimates
            ]
    for figure in ("parameters", "state_bytes"):
        sizes = [mean_text(row.estimate(figure), "{:,.0f}") for row in rows]
        columns[COLUMN_HEADS.get(figure, figure)] = sizes
    told = {
        h: cells
        for h, cells in columns.items()
        if h == column_head(headline) or {*cells} != {NOTHING}
    }
    out = new_table(f"{name}: mean ± 95% t interval over seeds", "arm", *told)
    for row, *cells in zip(rows, *told.values(), strict=True):
        out.add_row(row.arm, *cells)
    return out


def _successes(row: ArmRow) -> str:
    n = len(row.scores)
    return f"{success_rate(row.scores) * n:.0f}/{n}" if n else NOTHING


def _counts(row: ArmRow) -> str:
    """Finished and planned cells."""
    lost = {"diverged": row.diverged, "failed": row.failed}
    told = (f", {count} {state}" for state, count in lost.items() if count)
    return f"{len(row.cells)}/{row.planned}{''.join(told)}"


def contrasts_table(name: str, family: Sequence[MeasuredContrast]) -> Table:
    """Of one figure, paired by seed."""
    points = " (points)" if is_share(name) else ""
    heads = ["contrast", f"difference{points}", "p", "Holm p", "pairs", "first is"]
    bootstrapped = any(each.difference.interval for each in family)
    out = new_table(f"contrasts of {name}, paired by seed, ± 95% t interval", *heads)
    if bootstrapped:
        out.add_column("bootstrap interval", justify="right")
    for each in family:
        found = each.difference
        cells = [
            each.contrast.label,
            estimate_text(name, Estimate(found.mean, found.half, found.pairs), sign="+"),
            p_text(found.p),
            p_text(each.holm),
            str(found.pairs),
            each.words,
        ]
        if bootstrapped:
            ends = [
                estimate_text(name, Estimate(x, float("nan")), "+") for x in found.interval or ()
            ]
            cells.append(" to ".join(ends) or NOTHING)
        out.add_row(*cells)
    return out


def confounds_table(findings: Findings) -> Table | None:
    """What else differs between the arms that are compared, a line an arm."""
    if not findings.confounds.facts:
        return None
    heads, *rows = findings.confounds.table
    out = new_table("what else differs", *heads)
    for row in rows:
        out.add_row(*row)
    return out


def scaling_table(fits: Sequence[FittedLaw]) -> Table:
    """The forms of one law, by group."""
    law = fits[0].law
    out = new_table(f"{law.y} against {', '.join(law.x)}", ", ".join(law.by) or "law")
    for name in ("form", "formula", "parameters, 95% bootstrap interval"):
        out.add_column(name)
    out.add_column("held-out miss", justify="right")
    for fit in fits:
        if fit.scaling is None or not fit.scaling.forms:
            continue
        for form in fit.scaling.forms.values():
            parameters = (
                f"{name} = {value:.3g} ({low:.3g} to {high:.3g})"
                for name, (value, low, high) in form.parameters.items()
            )
            out.add_row(
                fit.group or law.y,
                f"{form.name}, best" if form is fit.scaling.best else form.name,
                form.formula,
                "; ".join(parameters) or "refused",
                f"{form.miss:.1%}",
            )
    return out


def continual_table(rows: Sequence[ArmRow]) -> Table | None:
    """Forgetting and transfer, if the cells went through phases."""
    found = {n: None for row in rows for cell in row.cells for n in cell.metrics}
    names = [n for n in found if n.startswith("continual/") and "/task=" not in n]
    if not names:
        return None
    heads = (f"{name.removeprefix('continual/')}\n(%)" for name in names)
    out = new_table("continual learning", "arm", *heads)
    for row in rows:
        out.add_row(row.arm, *(estimate_text(name, row.estimate(name)) for name in names))
    return out


def tuned_table(findings: Findings) -> Table | None:
    """What tuning chose for each arm."""
    first = {
        row.arm: cell
        for row in findings.rows
        for cell in findings.results.cells
        if cell.arm == row.arm
    }
    axes = [*dict.fromkeys(axis for cell in first.values() for axis in cell.tuned)]
    if not axes:
        return None
    out = new_table("tuned", "arm", *axes)
    for arm, cell in first.items():
        out.add_row(arm, *(cell.tuned.get(axis, NOTHING) for axis in axes))
    return out


def unfinished_table(findings: Findings) -> Table | None:
    """The cells that have no figures, and why; of the tuning runs those that never will."""
    results = findings.results
    cells = [cell for cell in results.cells if cell.state != "finished"]
    trials = [cell for cell in results.trials if cell.state in ("diverged", "failed")]
    if not cells and not trials:
        return None
    out = new_table("cells without figures", "arm")
    for name in ("seed", "state", "reason"):
        out.add_column(name)
    for cell in (*cells, *trials):
        tried = f" (tuning {', '.join(cell.tuned.values())})" if cell in trials else ""
        state = "missing" if cell.state == "pending" else cell.state
        why = without_folders(reason_of(results.root / cell.path)) or NOTHING
        out.add_row(cell.arm + tried, str(cell.seed), state, why)
    return out


def without_folders(text: str) -> str:
    """Paths shortened to their last part: a report is not of this machine."""
    return re.sub(r"(?<![\w./])/(?:[^\s/:'\",()]+/)+(?=[^\s/])", "", text)


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    out = Table(title="claims, by the mean over seeds", box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(("arm", "metric", "expected", "measured", "verdict")):
        out.add_column(head, justify="right" if n in (2, 3) else "left")
    for v in verdicts:
        expected, measured = v.shown
        within = f"{expected} {v.tolerance}"
        out.add_row(v.claim.subject, v.claim.metric, within, measured, v.word)
    return out
