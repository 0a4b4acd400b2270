"""What a grid found: rows per arm, a table, a summary on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from layerzoo.metrics import SuccessRate

from ..running.folder import write_json
from .results import Results
from .rows import Row, differences
from .statistics import Estimate, mean_interval, window_bound
from .verdicts import Verdict, plain_verdicts

SUCCESS = 0.9
"""Recall is bimodal over seeds (a phase transition), so the share above this is shown too."""
SHARES = ("accuracy/", "recall/accuracy", "recall/beyond_window", "recall_lag/")
"""How the names of figures begin that are shown in %."""


def bound_of(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The window's bound on accuracy and its standard error, if the grid has one ceiling for
    all arms."""
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
    return window_bound(ceiling, shown[0][1]["chance"], shown[0][1]["recall/queries"])


def success_rate(accuracies: Sequence[float]) -> float:
    """The share of the runs that reach SUCCESS."""
    metric = SuccessRate(SUCCESS)
    metric.update(torch.tensor(accuracies, dtype=torch.float64))
    return float(metric.compute())


def table(name: str, rows: Sequence[Row]) -> Table:
    """Mean and 95% t interval over cells; dashes where a task has no such metric."""
    kinds = {row.headline if row.metric else row.headline.partition("/")[0] for row in rows}
    what = kinds.pop() if len(kinds) == 1 else "accuracy"
    cells = max(row.planned for row in rows)
    title = f"{name}: {what}, mean ± 95% t interval over {cells} runs, accuracies in %"
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    heads = (
        "arm",
        what,
        "beyond window",
        "ceiling",
        f"≥{SUCCESS:.0%}",
        "loss",
        "params",
        "state",
    )
    for n, head in enumerate(heads):
        out.add_column(head, justify="right" if n else "left", no_wrap=True)
    for row in rows:
        accuracy = row.values(row.headline) if row.headline.startswith(SHARES) else []
        out.add_row(
            row.arm + _missing(row),
            shown(row.headline, row.estimate(row.headline)),
            _percent(row.estimate("recall/beyond_window")),
            _mean(row.estimate("recall/ceiling"), "{:.1%}"),
            f"{success_rate(accuracy) * len(accuracy):.0f}/{len(accuracy)}" if accuracy else "-",
            _mean(row.estimate("loss/held_out"), "{:.3f}"),
            _mean(row.estimate("parameters"), "{:,.0f}"),
            _mean(row.estimate("state_bytes"), "{:,.0f}"),
        )
    return out


def _missing(row: Row) -> str:
    """What a row does not say of all its cells."""
    parts = [f"{row.diverged} diverged"] if row.diverged else []
    if (ended := len(row.cells) + row.diverged) < row.planned:
        parts.append(f"{ended} of {row.planned} cells")
    return f" ({', '.join(parts)})" if parts else ""


def shown(name: str, estimate: Estimate) -> str:
    """A figure with its interval; what is a share, in %."""
    if name.startswith(SHARES):
        return _percent(estimate)
    half = "" if math.isnan(estimate.half) else f" ±{estimate.half:.3g}"
    return _mean(estimate, f"{{:.4g}}{half}")


def contrasts_table(results: Results, headline: str) -> Table:
    """Differences of the headline, paired by seed."""
    out = Table(title=f"contrasts of {headline}, paired by seed", box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(("contrast", "difference ± 95% t interval", "pairs")):
        out.add_column(head, justify="right" if n else "left")
    for contrast in results.report.contrasts:
        found = differences(results.cells, contrast.pairs, headline)
        out.add_row(contrast.label, shown(headline, mean_interval(found)), str(len(found)))
    return out


def _percent(estimate: Estimate) -> str:
    half = "" if math.isnan(estimate.half) else f" ±{100 * estimate.half:.1f}"
    return _mean(estimate, f"{{:.1%}}{half}").replace("%", "")


def _mean(estimate: Estimate, form: str) -> str:
    return "-" if math.isnan(estimate.mean) else form.format(estimate.mean)


def notes(rows: Sequence[Row]) -> list[str]:
    """What the table's numbers mean, and what is missing from it."""
    lines = []
    if bound := bound_of(rows):
        lines.append(
            f"A model that answers all that its window shows and guesses the rest recalls "
            f"{bound[0]:.1%} (standard error of one run {bound[1]:.1%})."
        )
    if rows and rows[0].cells:
        length = rows[0].cells[0].metrics["length"]
        lines.append(f"State: bytes of all layers after {length} tokens, batch 1, float32.")
    lines += _matched(rows)
    return lines


def _matched(rows: Sequence[Row]) -> list[str]:
    """What the arms were matched by, and how well."""
    found = {row.arm: row.cells[0].matched for row in rows if row.cells and row.cells[0].matched}
    if not found:
        return []
    first = next(iter(found.values()))
    worst = max(found, key=lambda arm: abs(found[arm]["deviation"]))
    return [
        f"Matched by {first['by']} to {first['target']:,.0f}; the farthest is {worst}, "
        f"{found[worst]['achieved']:,.0f} ({found[worst]['deviation']:+.1%})."
    ]


def write_summary(
    results: Results, rows: Sequence[Row], verdicts: Sequence[Verdict], path: Path
) -> None:
    """One JSON file with every arm's estimates, every cell's metrics and every claim."""
    names = ("recall/accuracy", "accuracy/all", "recall/beyond_window", "recall/ceiling")
    names += ("loss/held_out",)
    names += (metric,) if (metric := rows[0].metric) and metric not in names else ()
    arms = [
        {
            "arm": row.arm,
            "options": row.options,
            "seeds": [str(cell.seed) for cell in row.cells],
            "diverged": row.diverged,
            "matched": row.cells[0].matched if row.cells else {},
            **{name: row.estimate(name)._asdict() for name in names if row.values(name)},
            "success_rate": success_rate(v) if (v := row.values(row.headline)) else None,
            "cells": [cell.metrics for cell in row.cells],
            "folders": [cell.path for cell in row.cells],
        }
        for row in rows
    ]
    bound = bound_of(rows)
    summary = {
        "grid": results.fields.to_fields(),
        "window_bound": {"mean": bound[0], "standard_error": bound[1]} if bound else None,
        "claims": plain_verdicts(verdicts),
        "arms": arms,
    }
    write_json(path, summary)
