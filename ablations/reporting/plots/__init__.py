"""The plots of a grid's report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from ..findings import Findings
from .curves import curve_families, plot_continual, plot_curves
from .overview import plot_against_state, plot_headline, plot_scaling, plot_two_axes


class ReportPlot(NamedTuple):
    """section: of the report, which it stands in."""

    section: str
    caption: str
    figure: Figure


def report_plots(findings: Findings) -> dict[str, ReportPlot]:
    """By the names of their files, without the ending, in the report's order."""
    return {
        name: ReportPlot(section, caption, figure)
        for name, section, caption, figure in _all_plots(findings)
        if figure is not None
    }


def figures_by_name(pictures: Mapping[str, ReportPlot]) -> dict[str, Figure]:
    return {name: picture.figure for name, picture in pictures.items()}


def _all_plots(findings: Findings) -> Iterator[tuple[str, str, str, Figure | None]]:
    head = findings.headline
    yield "overview", "results", f"{head} by arm", plot_headline(findings)
    axes = " and ".join(dict.fromkeys(axis for row in findings.rows for axis in row.options))
    yield "axes", "results", f"{head} by {axes}, mean over seeds", plot_two_axes(findings)
    yield "state", "results", f"{head} against the bytes of state", plot_against_state(findings)
    for family in curve_families(findings):
        sides = " and ".join(family.sides)
        caption = f"{family.name} by {sides}, mean over seeds with 95% t interval"
        yield (
            _file_name(f"{family.name}-{sides}"),
            "curves",
            caption,
            plot_curves(findings, family),
        )
    yield (
        "continual_matrix",
        "continual",
        "Accuracy on each task after each phase (0: before training), mean over seeds",
        plot_continual(findings),
    )
    for n, law in enumerate(findings.results.report.scaling, 1):
        fits = [fit for fit in findings.laws if fit.law is law]
        caption = f"{law.y} against {' and '.join(law.x)}; hollow: held out for the misses"
        yield f"scaling-{n}", f"scaling {n}", caption, plot_scaling(fits)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)
