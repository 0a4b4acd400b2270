"""Scaling laws beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from layerzoo.support.style import COLOURS, MARKERS, tidy

from ..laws import FittedLaw
from .canvas import add_legend, width_of_names, wrapped


def plot_scaling(fits: Sequence[FittedLaw]) -> Figure | None:
    """A law's groups: y against its size, with the best form and its 95% bootstrap band; of two
    sizes, y as measured against y as fitted. Hollow: what was held out for the misses. A fit that
    is refused is not drawn."""
    fits = [fit for fit in fits if fit.cells]
    if not fits:
        return None
    law = fits[0].law
    names = [fit.group or law.y for fit in fits]
    figure = Figure(figsize=(5.8 + width_of_names(names, 8), 4.0), layout="constrained")
    axes = figure.add_subplot()
    two = len(law.x) == 2
    for n, (fit, name) in enumerate(zip(fits, names, strict=True)):
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
        best = fit.scaling.best if fit.scaling and fit.scaling.refused is None else None
        if two and best is None:
            continue
        x = best.predict(fit.x) if two and best else fit.x[:, 0]
        x = np.where(np.isfinite(x), x, np.nan)
        apart = (fit.x == fit.x.max(0)).any(1)
        for some, face, label in ((~apart, colour, wrapped(name)), (apart, "white", None)):
            axes.plot(x[some], fit.y[some], marker, ms=5, mec=colour, mfc=face, label=label)
        if best and not two:
            _draw_fit(axes, best, x, colour)
    if two:
        ends = [
            min(axes.get_xlim()[0], axes.get_ylim()[0]),
            max(*axes.get_xlim(), *axes.get_ylim()),
        ]
        axes.plot(ends, ends, color="0.6", lw=1, ls="--", zorder=1)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{law.y} as fitted" if two else law.x[0])
    axes.set_ylabel(law.y)
    add_legend(axes, title=", ".join(law.by) or None)
    tidy(axes)
    return figure


def _draw_fit(axes: Any, form: Any, x: Any, colour: str) -> None:
    at = np.geomspace(x.min(), x.max(), 100)
    low, high = form.band(at)
    axes.plot(at, form.predict(at), color=colour, lw=1.3)
    axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
