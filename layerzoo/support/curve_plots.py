"""Curves and heat maps of figures that share a name: `recall_lag/16`, `recall_depth/50/length=64`.

The name says it all: `family/number` is a point of a curve, `family/number/number` of several
curves, or of a heat map if every pair of numbers is there. A number may say what it is of, as in
`recall_depth/50/length=1024`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from layerzoo.support.plot_style import COLOURS, MARKERS, tidy

Points = dict[tuple[int, ...], float]


class Family(NamedTuple):
    """Figures of one name. sides: what their numbers are of."""

    name: str
    sides: tuple[str, ...]
    points: Points

    @property
    def whole(self) -> bool:
        """Whether every pair of numbers is there: then it is a map."""
        count = math.prod(len({at[n] for at in self.points}) for n in range(len(self.sides)))
        return len(self.sides) == 2 and len(self.points) == count


def families(figures: Mapping[str, float]) -> list[Family]:
    """The families of at least two figures a side, the curves first. A figure that is the same in
    all parts makes no curve."""
    found: dict[tuple[str, tuple[str, ...], bool], Points] = {}
    for tag, value in figures.items():
        if match := re.fullmatch(r"(.+?)((?:/(?:\w+=)?\d+){1,2})", tag):
            labels, numbers = zip(*re.findall(r"/(?:(\w+)=)?(\d+)", match[2]), strict=True)
            sides = tuple(label or _side(match[1], n) for n, label in enumerate(labels))
            points = found.setdefault((match[1], sides, any(labels)), {})
            points[tuple(map(int, numbers))] = float(value)
    some = [
        Family(name, sides, dict(sorted(points.items())))
        for (name, sides, labelled), points in found.items()
        if all(len({at[n] for at in points}) > 1 for n in range(len(sides)))
        and not (labelled and len({*points.values()}) == 1)
    ]
    return sorted(some, key=lambda family: len(family.sides))


def _side(name: str, n: int) -> str:
    """What a bare number of a family is of: of recall_lag the lag, of loss_at the position."""
    last = name.rpartition("/")[2].rpartition("_")[2]
    return {"at": "position"}.get(last, last) if n == 0 else "and"


def draw(family: Family) -> Figure:
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    if family.whole:
        _map(axes, family)
    else:
        _curves(axes, family)
    axes.set_title(family.name, fontsize=10)
    return figure


def _map(axes: Any, family: Family) -> None:
    down, along = (sorted({at[n] for at in family.points}) for n in (0, 1))
    values = np.array([[family.points[y, x] for x in along] for y in down])
    heat_map(axes, values, down, along)
    axes.set_ylabel(family.sides[0])
    axes.set_xlabel(family.sides[1])


def heat_map(axes: Any, values: NDArray[Any], down: Sequence[Any], along: Sequence[Any]) -> None:
    """Values `[down, along]` in colour and in words; what is masked is left white, and what is
    not finite has no colour, only its word."""
    values = np.ma.masked_array(values)
    coloured = np.ma.masked_invalid(values)
    known = coloured.compressed()
    share = bool(((known >= 0) & (known <= 1)).all())
    limits = {"vmin": 0, "vmax": 1} if share else {}
    image = axes.imshow(coloured, aspect="auto", cmap="viridis", **limits)
    middle = 0.5 if share else float(np.median(known))
    for (y, x), value in np.ma.ndenumerate(values):
        light = value > middle or not np.isfinite(value)
        word = f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"
        style = {"color": "black" if light else "white", "fontsize": 8}
        axes.text(x, y, word, ha="center", va="center", **style)
    axes.set_xticks(range(len(along)), along)
    axes.set_yticks(range(len(down)), down)
    axes.figure.colorbar(image, ax=axes)


def write_not_finite(axes: Any, at: Sequence[float], values: Any, colour: str) -> None:
    """nan and inf, which a line leaves out, in words at the foot of the panel."""
    for x, value in zip(at, values, strict=True):
        if not math.isfinite(value):
            axes.update_datalim([(x, 0)], updatey=False)
            style = {"ha": "center", "color": colour, "fontsize": 8}
            axes.text(x, 0.02, f"{value}", transform=axes.get_xaxis_transform(), **style)


def _curves(axes: Any, family: Family) -> None:
    points, lines = family.points, dict[int, list[tuple[int, float]]]()
    for at, value in points.items():
        lines.setdefault(at[-1] if len(at) == 2 else 0, []).append((at[0], value))
    for n, (label, line) in enumerate(sorted(lines.items())):
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
        at, figures = zip(*line, strict=True)
        values = np.array(figures, dtype=np.float64)
        write_not_finite(axes, at, values, colour)
        drawn = np.where(np.isfinite(values), values, np.nan)
        axes.plot(at, drawn, color=colour, marker=marker, ms=4, label=label)
    numbers = sorted({at[0] for at in points})
    if numbers[0] > 0 and numbers[-1] >= 8 * numbers[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if all(0 <= value <= 1 for value in points.values() if math.isfinite(value)):
        axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel(family.sides[0])
    if len(lines) > 1:
        axes.legend(
            title=family.sides[1],
            frameon=False,
            fontsize=8,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    tidy(axes)
