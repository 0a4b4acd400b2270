"""What a grid's finished cells say together: a table, contrasts, claims, a plot, a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from layerzoo.spec import suggest

from ..cells.cell import Cell
from ..cells.grid import Grid
from ..running.folder import RECORD, read_json
from .plot import plot
from .report import contrasts_table, notes, table, write_summary
from .rows import Row, pooled, read_rows
from .tensorboard import write_hparams
from .verdicts import claims_table, judge


def compare(
    grid: Grid,
    cells: Sequence[Cell],
    failed: Mapping[str, str],
    command: str,
    out: Path,
    console: Console,
) -> bool:
    """Write and print it all; False if all cells have ended and a claim does not hold."""
    report = grid.report
    rows = read_rows(cells, out, report and report.metric)
    verdicts = judge(grid.claims, rows)
    write_summary(grid, rows, verdicts, failed, command, out / "summary.json")
    write_hparams(rows, out)
    reach = cells[0].config["data"].get("init_args", {}).get("reach")
    drawn = plot(f"{grid.name} ({command})", rows, reach, out / "plot.png")
    console.print(table(grid.name, rows))
    if report and report.by:
        console.print(table(f"{grid.name} by {', '.join(report.by)}", pooled(rows, report.by)))
    for line in (*notes(rows), *_doubts(rows, out)):
        console.print(line, markup=False)
    if report and report.contrasts:
        console.print(contrasts_table(report.contrasts, rows))
    if verdicts:
        console.print(claims_table(verdicts))
    if drawn:
        console.print(f"plot:        {out / 'plot.png'}", markup=False)
    console.print(f"summary:     {out / 'summary.json'}", markup=False)
    console.print(f"tensorboard: tensorboard --logdir {out}", markup=False)
    ended = all(len(row.metrics) + row.diverged == row.planned for row in rows)
    return not ended or all(verdict.holds for verdict in verdicts)


def _doubts(rows: Sequence[Row], out: Path) -> list[str]:
    """What the cells have not in common, and a metric that none has."""
    records = [read_json(out / cell.path / RECORD) for row in rows for cell in row.cells]
    lines = []
    for what in ("layerzoo", "commit", "torch"):
        found = {str(record.get("versions", {}).get(what)) for record in records}
        if len(found) > 1:
            lines.append(f"warning: cells ran with different {what}: {', '.join(sorted(found))}")
    metrics = [m for row in rows for m in row.metrics]
    name = rows[0].metric
    if name and metrics and not any(name in m for m in metrics):
        lines.append(f"warning: no cell measured '{name}'; {suggest(name, metrics[0])}")
    return lines
