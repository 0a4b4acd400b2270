"""What else differs between the arms that a grid compares, before any cell has run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..cells.cell import Cell
from ..cells.confounds import Confounds, compared_pairs, find_confounds
from ..cells.differences import ComparedArm
from ..cells.grid import Grid
from ..cells.sizes import sizes_of


def planned_confounds(grid: Grid, cells: Sequence[Cell]) -> Confounds:
    """The confounds of a grid, from its reported cells: cells of one arm differ in seeds alone."""
    firsts = dict[str, Cell]()
    for cell in cells:
        firsts.setdefault(cell.arm, cell)
    sides = {
        arm: ComparedArm(cell.options, cell.config, frozenset(cell.matched.get("solved", {})))
        for arm, cell in firsts.items()
    }
    return find_confounds(
        sides,
        compared_pairs(
            grid.report, grid.claims, {arm: side.options for arm, side in sides.items()}
        ),
        grid.axes,
        grid.tuning.axes if grid.tuning else {},
        {arm: sizes_of(cell.config).named for arm, cell in firsts.items()},
        matched=grid.match is not None,
    )


def show_confounds(found: Confounds, console: Console) -> None:
    """Print the table, then the notes."""
    if found.facts:
        heads, *rows = found.table
        table = Table(title="what else differs", box=SIMPLE_HEAD, padding=(0, 1))
        for n, head in enumerate(heads):
            table.add_column(head, justify="right" if n else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in found.notes:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
