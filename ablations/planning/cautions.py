"""What is known of a grid before it runs that its results would suffer from."""

from __future__ import annotations

import json
from collections.abc import Sequence

from layerzoo.data.recall import RecallTask

from ..cells import configs
from ..cells.cell import Cell

SAMPLE = 256
"""Samples that tell whether any answer lies beyond a reach."""
SEEDS = 3
NAMED = 3
"""Arms that a line names before it only counts them."""


def cautions(cells: Sequence[Cell], compared: bool) -> list[str]:
    """Lines that name arms, a fault, and the way out.

    Args:
        compared: whether the grid compares arms, or claims anything of them.
    """
    arms = {cell.arm: cell for cell in cells}
    lines: dict[str, list[str]] = {}
    for arm, cell in arms.items():
        for line in [*_of_model(cell), *_of_task(cell)]:
            lines.setdefault(line, []).append(arm)
    out = [f"{_names(names, len(arms))}: {line}" for line, names in lines.items()]
    few = {arm: sum(cell.arm == arm for cell in cells) for arm in arms} if compared else {}
    if few and min(few.values()) < SEEDS:
        names = [arm for arm, count in few.items() if count < SEEDS]
        out.append(
            f"{_names(names, len(arms))}: fewer than {SEEDS} seeds make intervals so wide that "
            f"comparisons and claims mean little; give seeds {[*range(SEEDS)]} or more"
        )
    return out


def _names(arms: Sequence[str], of: int) -> str:
    if len(arms) == of > 1:
        return "every arm"
    more = f" and {len(arms) - NAMED} more" if len(arms) > NAMED else ""
    return "; ".join(arms[:NAMED]) + more


_found: dict[str, list[str]] = {}


def _of_model(cell: Cell) -> list[str]:
    length = configs.task(cell.config).length
    key = json.dumps([cell.config["model"]["network"], length])
    if key not in _found:
        _found[key] = configs.model(cell.config).cautions(length)
    return _found[key]


def _of_task(cell: Cell) -> list[str]:
    task = configs.task(cell.config)
    if not isinstance(task, RecallTask) or task.own_reach is None:
        return []
    if task.varied(test_samples=SAMPLE).ceiling("test") < 1:
        return []
    return [
        f"the window arm's reach, {task.own_reach.back} tokens back, holds the answers to all "
        f"queries, so recall/ceiling is 1 and there is no recall/beyond_window; set a greater "
        f"data.init_args.length, or a shorter window"
    ]
