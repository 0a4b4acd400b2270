"""What a grid's finished cells say together: tables on screen, a report in files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from layerzoo.spec import SpecError
from layerzoo.support.json_files import write_json

from .about import doubts, missing_results
from .board.hparams import write_hparams
from .board.summary import write_summary_run
from .data import write_cell_table
from .figures import ReportPlot, figures_by_name, report_plots
from .figures.canvas import save_svg
from .findings import Findings, read_findings
from .html import html_page
from .report import markdown_page, results_notes, scaling_notes
from .summary import summary_tree
from .tables import confounds_table, contrasts_table, results_table, scaling_table
from .verdicts import claims_table

REPORT_FOLDER = "report"
"""In the grid's folder: its report."""


def compare(root: Path, console: Console, to: Path | None = None) -> bool:
    """Write and print it all; False if all cells have ended and a claim does not hold.

    Args:
        to: the folder of the report, default `report` in the grid's.
    """
    findings, folder = read_findings(root), to or root / REPORT_FOLDER
    try:
        drawn = report_plots(findings)
        files = write_report(findings, drawn, folder)
    except OSError as error:
        raise SpecError(f"{folder}: {error.strerror}; give another --to") from None
    write_hparams([findings.results], root)
    write_summary_run(findings.results, figures_by_name(drawn), markdown_page(findings, {}))
    _print_findings(findings, console)
    console.print(f"report:      {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    console.print(f"tensorboard: layerzoo ablate board {root}", markup=False, soft_wrap=True)
    return not findings.results.ended or all(verdict.holds for verdict in findings.verdicts)


def write_report(findings: Findings, drawn: Mapping[str, ReportPlot], folder: Path) -> list[Path]:
    """Write the report's files anew, and remove the figures of an earlier one that are in it no
    more.

    Returns: the files, but for the figures.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    text_file, html_file = folder / "report.md", folder / "report.html"
    before = text_file.read_text(encoding="utf-8") if text_file.is_file() else ""
    for name, picture in drawn.items():
        save_svg(picture.figure, folder / "figures" / f"{name}.svg")
    for stale in {*re.findall(r"\]\(figures/([\w.=-]+)\.svg\)", before)} - {*drawn}:
        (folder / "figures" / f"{stale}.svg").unlink(missing_ok=True)
    text = markdown_page(findings, drawn)
    text_file.write_text(text, encoding="utf-8")
    svgs = {f"figures/{name}.svg": (folder / "figures" / f"{name}.svg") for name in drawn}
    inside = {name: path.read_text(encoding="utf-8") for name, path in svgs.items()}
    html_file.write_text(html_page(findings.results.name, text, inside), encoding="utf-8")
    write_json(folder / "summary.json", summary_tree(findings))
    return [
        text_file,
        html_file,
        folder / "summary.json",
        *write_cell_table(findings.results, folder),
    ]


def _print_findings(findings: Findings, console: Console) -> None:
    results = findings.results
    console.print(results_table(findings, findings.rows, results.name))
    if findings.groups:
        name = f"{results.name} by {', '.join(results.report.by)}"
        console.print(results_table(findings, findings.groups, name))
    missing = missing_results(findings)
    for line in (*results_notes(findings), *doubts(findings), *([missing] if missing else [])):
        console.print(line, markup=False)
    for name, family in findings.contrasts.items():
        console.print(contrasts_table(name, family))
    if table := confounds_table(findings):
        console.print(table)
    for line in findings.confounds.notes:
        console.print(line, markup=False)
    for line in findings.confounds.warnings:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)
    for law in results.report.scaling:
        console.print(scaling_table([fit for fit in findings.laws if fit.law is law]))
    for line in (line for fit in findings.laws for line in scaling_notes(fit)):
        console.print(line, markup=False)
    if findings.verdicts:
        console.print(claims_table(findings.verdicts))
