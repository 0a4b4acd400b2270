"""`layerzoo ablate status DIR`: where a grid's cells are, by what is on disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerzoo.spec import SpecError
from layerzoo.support.json_files import dumps, floats

from .folder import CELLS, ENDED, PROGRESS, STATES, cell_state, read_json, reason_of
from .pace import Pace, duration_text


def read_listed_cells(root: Path) -> list[dict[str, Any]]:
    """The cells that `layerzoo ablate run` listed, each with its state.

    Raises:
        SpecError: it has not run here, or the list is damaged.
    """
    if not (root / CELLS).is_file():
        below = sorted(path.parent for path in root.glob(f"*/{CELLS}"))
        hint = f"give one of {', '.join(map(str, below))}" if below else "run a grid with --out"
        raise SpecError(f"{root}: is not the folder of a grid's results; {hint}")
    try:
        cells = json.loads((root / CELLS).read_text(encoding="utf-8"))
    except ValueError:
        damaged = f"{root / CELLS}: is damaged; `layerzoo ablate run` writes it anew"
        raise SpecError(damaged) from None
    return [{**cell, "state": cell_state(root / cell["path"])} for cell in cells]


def show_status(root: Path, as_json: bool) -> int:
    """Print states by arm, what runs, and what went wrong. The exit status is 0 once all cells
    have ended well or diverged, 1 before."""
    cells = read_listed_cells(root)
    ended = all(cell["state"] in ENDED for cell in cells)
    for cell in cells:
        if cell["state"] in ("running", "started"):
            cell["progress"] = floats(read_json(root / cell["path"] / PROGRESS))
        if why := reason_of(root / cell["path"]):
            cell["reason"] = why
    if as_json:
        print(dumps(cells))
        return 0 if ended else 1
    console = Console()
    console.print(_states_table(cells))
    running = [root / cell["path"] for cell in cells if cell["state"] == "running"]
    for cell in cells:
        if cell["state"] in ("running", "started") and (now := cell["progress"]):
            where = f"step {now['step']} of {now['steps']}, loss {now['loss']:.3f}"
            host = f" on {now['host']}" if cell["state"] == "running" else ""
            console.print(f"{cell['state']}{host}: {cell['path']}: {where}", markup=False)
        elif "reason" in cell:
            why = f"{cell['state']}: {cell['path']}: {cell['reason']}"
            console.print(why, markup=False, soft_wrap=True)
    if running:
        pace = Pace()
        for cell in cells:
            if cell["state"] == "finished":
                pace.finished(root / cell["path"])
        waiting = [root / c["path"] for c in cells if c["state"] in ("pending", "started")]
        left = duration_text(pace.left(waiting, running, len(running)))
        console.print(f"left: {left}, {len(running)} at a time")
    return 0 if ended else 1


def _states_table(cells: list[dict[str, Any]]) -> Table:
    arms: dict[str, Counter[str]] = {}
    for cell in cells:
        name = cell["arm"] if cell["split"] == "test" else f"{cell['arm']} (tuning)"
        arms.setdefault(name, Counter())[cell["state"]] += 1
    total = sum(arms.values(), Counter())
    states = [name for name in STATES if total[name]]
    out = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(("arm", "cells", *states)):
        out.add_column(head, justify="right" if n else "left", no_wrap=True)
    for name, counts in (*arms.items(), ("all", total)):
        out.add_row(name, str(counts.total()), *(str(counts[s] or "") for s in states))
    return out
