"""What a grid found: rows per arm, a table, a summary on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from layerzoo.metrics import SuccessRate

from .claims import Verdict, plain_verdicts
from .grid import Cell, Grid
from .rows import Row
from .statistics import Estimate, mean_interval, window_bound
from .worker import METRICS

SUCCESS = 0.9
"""Recall is bimodal over seeds (a phase transition), so the share above this is shown too."""


def read_rows(cells: Sequence[Cell], out: Path) -> list[Row]:
    """The finished cells' metrics, grouped by arm, in the grid's order."""
    rows: dict[str, Row] = {}
    for cell in cells:
        path = out / cell.path / METRICS
        row = rows.setdefault(cell.arm, Row(cell.arm, cell.options, [], []))
        if path.is_file():
            row.seeds.append(cell.seed)
            row.metrics.append(json.loads(path.read_text()))
    return list(rows.values())


def bound_of(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The window's bound on accuracy and its standard error, if the grid has one ceiling for
    all arms."""
    shown = [
        (seed, m)
        for row in rows
        for seed, m in zip(row.seeds, row.metrics, strict=True)
        if m.get("chance") and "recall/ceiling" in m
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


def table(grid: Grid, rows: Sequence[Row]) -> Table:
    """Mean and 95% t interval over seeds; dashes where a task has no such metric."""
    kinds = {row.headline.partition("/")[0] for row in rows}
    what = kinds.pop() if len(kinds) == 1 else "accuracy"
    title = f"{grid.name}: {what} in %, mean ± 95% t interval over {len(grid.seeds)} seeds"
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
        accuracy = row.values(row.headline)
        missing = "" if len(row.metrics) == len(grid.seeds) else f" ({len(row.metrics)} seeds)"
        out.add_row(
            row.arm + missing,
            _percent(row.estimate(row.headline)),
            _percent(row.estimate("recall/beyond_window")),
            _mean(row.estimate("recall/ceiling"), "{:.1%}"),
            f"{success_rate(accuracy) * len(accuracy):.0f}/{len(accuracy)}" if accuracy else "-",
            _mean(row.estimate("loss/held_out"), "{:.3f}"),
            _mean(row.estimate("parameters"), "{:,.0f}"),
            _mean(row.estimate("state_bytes"), "{:,.0f}"),
        )
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
    if rows and rows[0].metrics:
        length = rows[0].metrics[0]["length"]
        lines.append(f"State: bytes of all layers after {length} tokens, batch 1, float32.")
    return lines


def write_summary(
    grid: Grid,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    failed: dict[str, str],
    command: str,
    path: Path,
) -> None:
    """One JSON file with every arm's estimates, every cell's metrics and every claim."""
    names = ("recall/accuracy", "accuracy/all", "recall/beyond_window", "recall/ceiling")
    names += ("loss/held_out",)
    arms = [
        {
            "arm": row.arm,
            "options": row.options,
            "seeds": row.seeds,
            **{name: row.estimate(name)._asdict() for name in names if row.values(name)},
            "success_rate": success_rate(v) if (v := row.values(row.headline)) else None,
            "cells": row.metrics,
        }
        for row in rows
    ]
    bound = bound_of(rows)
    summary = {
        "grid": grid.to_fields(),
        "command": command,
        "window_bound": {"mean": bound[0], "standard_error": bound[1]} if bound else None,
        "failed": failed,
        "claims": plain_verdicts(verdicts),
        "arms": arms,
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")
