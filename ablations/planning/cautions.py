"""What a grid's results would suffer from, as far as it is known before the grid runs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerzoo.data.recall import RecallTask

from ..cells import configs
from ..cells.cell import Cell
from ..cells.confounds import Confounds, compared_pairs, find_confounds
from ..cells.differences import ComparedArm
from ..cells.grid import Grid
from ..cells.sizes import sizes_of

CEILING_SAMPLES = 256
"""Samples that tell whether any answer lies beyond a reach."""
LEAST_SEEDS = 3
ARMS_NAMED = 3
"""Arms that a line names before it only counts them."""


def cautions(cells: Sequence[Cell], compared: bool) -> list[str]:
    """Lines that name arms, a fault, and the way out.

    Args:
        compared: whether the grid compares arms, or claims anything of them.
    """
    arms = {cell.arm: cell for cell in cells}
    lines: dict[str, list[str]] = {}
    for arm, cell in arms.items():
        for line in [*_model_cautions(cell), *_task_cautions(cell)]:
            lines.setdefault(line, []).append(arm)
    out = [f"{_arm_names(names, len(arms))}: {line}" for line, names in lines.items()]
    few = {arm: sum(cell.arm == arm for cell in cells) for arm in arms} if compared else {}
    if few and min(few.values()) < LEAST_SEEDS:
        names = [arm for arm, count in few.items() if count < LEAST_SEEDS]
        out.append(
            f"{_arm_names(names, len(arms))}: fewer than {LEAST_SEEDS} seeds make intervals so "
            f"wide that comparisons and claims mean little; give seeds "
            f"{[*range(LEAST_SEEDS)]} or more"
        )
    return out


def _arm_names(arms: Sequence[str], of: int) -> str:
    if len(arms) == of > 1:
        return "every arm"
    more = f" and {len(arms) - ARMS_NAMED} more" if len(arms) > ARMS_NAMED else ""
    return "; ".join(arms[:ARMS_NAMED]) + more


_known_model_cautions: dict[str, list[str]] = {}


def _model_cautions(cell: Cell) -> list[str]:
    length = configs.task_of(cell.config).length
    key = json.dumps([cell.config["model"]["network"], length])
    if key not in _known_model_cautions:
        _known_model_cautions[key] = configs.model_of(cell.config).cautions(length)
    return _known_model_cautions[key]


def _task_cautions(cell: Cell) -> list[str]:
    task = configs.task_of(cell.config)
    if not isinstance(task, RecallTask) or task.own_reach is None:
        return []
    if task.varied(test_samples=CEILING_SAMPLES).ceiling("test") < 1:
        return []
    return [
        f"the window arm's reach, {task.own_reach.back} tokens back, holds the answers to all "
        f"queries, so recall/ceiling is 1 and there is no recall/beyond_window; set a greater "
        f"data.init_args.length, or a shorter window"
    ]


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
