"""The figures of a grid's report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from ..findings import Findings
from .continual import continual
from .curves import curve_families, curves
from .overview import against_state, by_both, overview
from .scaling import scaling


class Picture(NamedTuple):
    """section: of the report, which it stands in."""

    section: str
    caption: str
    figure: Figure


def pictures(findings: Findings) -> dict[str, Picture]:
    """By the names of their files, without the ending, in the report's order."""
    return {
        name: Picture(section, caption, figure)
        for name, section, caption, figure in _all(findings)
        if figure is not None
    }


def figures_of(pictures: Mapping[str, Picture]) -> dict[str, Figure]:
    return {name: picture.figure for name, picture in pictures.items()}


def _all(findings: Findings) -> Iterator[tuple[str, str, str, Figure | None]]:
    head = findings.headline
    yield "overview", "results", f"{head} by arm", overview(findings)
    axes = " and ".join(dict.fromkeys(axis for row in findings.rows for axis in row.options))
    yield "axes", "results", f"{head} by {axes}, mean over seeds", by_both(findings)
    yield "state", "results", f"{head} against the bytes of state", against_state(findings)
    for family in curve_families(findings):
        sides = " and ".join(family.sides)
        caption = f"{family.name} by {sides}, mean over seeds with 95% t interval"
        yield _slug(f"{family.name}-{sides}"), "curves", caption, curves(findings, family)
    yield (
        "continual_matrix",
        "continual",
        "Accuracy on each task after each phase (0: before training), mean over seeds",
        continual(findings),
    )
    for n, law in enumerate(findings.results.report.scaling, 1):
        fits = [fit for fit in findings.laws if fit.law is law]
        caption = f"{law.y} against {' and '.join(law.x)}; hollow: held out for the misses"
        yield f"scaling-{n}", f"scaling {n}", caption, scaling(fits)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)
