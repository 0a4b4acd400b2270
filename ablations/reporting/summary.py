"""summary.json: a grid's findings for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from .about import rerun_command
from .contrasts import MeasuredContrast
from .findings import Findings, shared_window_bound
from .laws import FittedLaw
from .numbers import is_accuracy
from .statistics import Estimate, success_rate
from .verdicts import verdict_trees

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
