"""What a grid's finished cells say together: a table, contrasts, claims, a plot, a summary."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from layerzoo.spec import suggest

from .board.hparams import write_hparams
from .board.summary import write_summary_run
from .plot import plot
from .report import contrasts_table, notes, table, write_summary
from .results import Results, read_results
from .rows import Row, pooled, rows_of
from .verdicts import claims_table, judge


def compare(out: Path, console: Console) -> bool:
    """Write and print it all; False if all cells have ended and a claim does not hold."""
    results = read_results(out)
    report = results.report
    rows = rows_of(results.cells, report.metric)
    verdicts = judge(results.claims, rows)
    write_summary(results, rows, verdicts, out / "summary.json")
    write_hparams([results], out)
    figures, text = pictures(results)
    write_summary_run(results, figures, text)
    for figure in figures.values():
        figure.savefig(out / "plot.png", dpi=130)
    console.print(table(results.name, rows))
    if report.by:
        groups = pooled(results.cells, report.by, report.metric)
        console.print(table(f"{results.name} by {', '.join(report.by)}", groups))
    for line in (*notes(rows), *_doubts(results, rows)):
        console.print(line, markup=False)
    if report.contrasts:
        console.print(contrasts_table(results, rows[0].headline))
    if verdicts:
        console.print(claims_table(verdicts))
    if figures:
        console.print(f"plot:        {out / 'plot.png'}", markup=False)
    console.print(f"summary:     {out / 'summary.json'}", markup=False)
    console.print(f"tensorboard: layerzoo ablate board {out}", markup=False)
    return not results.ended or all(verdict.holds for verdict in verdicts)


def pictures(results: Results) -> tuple[dict[str, Figure], str]:
    """What TensorBoard shows of them: a figure, and the table as text."""
    if not results.cells:
        return {}, "No arm is tuned yet."
    rows = rows_of(results.cells, results.report.metric)
    reach = results.config(results.cells[0])["data"].get("init_args", {}).get("reach")
    figure = plot(results.name, rows, reach)
    paper = io.StringIO()
    Console(file=paper, width=200).print(table(results.name, rows))
    text = "\n".join(["```", paper.getvalue(), "```", *notes(rows)])
    return ({} if figure is None else {"overview": figure}), text


def _doubts(results: Results, rows: Sequence[Row]) -> list[str]:
    """What the cells have not in common, and a metric that none has."""
    cells = [cell for row in rows for cell in row.cells]
    records = [results.record(cell) for cell in cells]
    lines = []
    for what in ("layerzoo", "commit", "torch"):
        found = {str(record.get("versions", {}).get(what)) for record in records}
        if len(found) > 1:
            lines.append(f"warning: cells ran with different {what}: {', '.join(sorted(found))}")
    name = results.report.metric
    if name and cells and not any(name in cell.metrics for cell in cells):
        lines.append(f"warning: no cell measured '{name}'; {suggest(name, cells[0].metrics)}")
    return lines
