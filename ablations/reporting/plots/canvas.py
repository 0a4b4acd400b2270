"""What plots have in common: how arms look, how long names fit, how SVG is saved."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from layerzoo.support.plot_style import COLOURS, MARKERS

from ..arm_rows import ArmRow

GREY = "0.4"
LINE_WIDTH = 64
"""Characters of a name in a line."""


def rows_by_first_axis(rows: Sequence[ArmRow]) -> list[list[ArmRow]] | None:
    """The rows by their options of the first axis, if these are few and of few rows each."""
    found: dict[str, list[ArmRow]] = {}
    for row in rows:
        found.setdefault(_first_option(row), []).append(row)
    few = 1 < len(found) <= len(MARKERS) and max(map(len, found.values())) <= len(COLOURS)
    return [*found.values()] if few else None


LineStyle = tuple[str, str]
"""Colour and marker."""


def arm_styles(rows: Sequence[ArmRow]) -> dict[str, LineStyle]:
    """By arm, the same in all figures; no two alike up to 72 arms."""
    if parts := _two_part_styles(rows):
        colours, markers = parts
        return {
            row.arm: (colours[_other_options(row)], markers[_first_option(row)]) for row in rows
        }
    return {
        row.arm: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)])
        for n, row in enumerate(rows)
    }


def legend_styles(rows: Sequence[ArmRow]) -> dict[str, LineStyle]:
    """What a legend says: arms; or, if the looks have two parts, the options of each."""
    if parts := _two_part_styles(rows):
        colours, markers = parts
        return {name: (GREY, marker) for name, marker in markers.items()} | {
            name: (colour, "s") for name, colour in colours.items()
        }
    return arm_styles(rows)


def _two_part_styles(rows: Sequence[ArmRow]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Of more arms than there are colours: a colour for all but the first option, a marker for
    the first; None if these are too many, or are all that an arm has."""
    rests = [*dict.fromkeys(_other_options(row) for row in rows)]
    if (
        len(rows) <= len(COLOURS)
        or len(rests) > len(COLOURS)
        or not rows_by_first_axis(rows)
        or "" in rests
    ):
        return None
    firsts = dict.fromkeys(_first_option(row) for row in rows)
    return (
        dict(zip(rests, COLOURS, strict=False)),
        dict(zip(firsts, MARKERS, strict=False)),
    )


def _first_option(row: ArmRow) -> str:
    return next(iter(row.options.values()), "")


def _other_options(row: ArmRow) -> str:
    return ",".join([*row.options.values()][1:])


def wrapped(name: str) -> str:
    """A long name in lines, parted at commas if it can be."""
    lines = textwrap.wrap(name.replace(",", ", "), LINE_WIDTH)
    return "\n".join(line.replace(", ", ",") for line in lines)


def width_of_names(names: Sequence[str], size: float = 9) -> float:
    """The width of the longest line of names at a font size, roughly."""
    longest = max((len(line) for name in names for line in wrapped(name).split("\n")), default=0)
    return longest * size * 0.6 / 72


def add_legend(axes: Any, **options: Any) -> None:
    """Beside the panel, so that it covers no data."""
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), **options)


def show_percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def save_svg(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure; its text stays text."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata=nothing)
