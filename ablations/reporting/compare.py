"""What a grid's finished cells say together: tables on screen, a report in files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from layerzoo.spec import SpecError
from layerzoo.support.json_files import write_json

from .about import doubts, partial
from .board.hparams import write_hparams
from .board.summary import write_summary_run
from .data import write_data
from .figures import Picture, figures_of, pictures
from .figures.canvas import save_svg
from .findings import Findings, find
from .html import as_html
from .report import notes, page, scaling_notes
from .summary import summary
from .tables import confounds_table, contrasts_table, results_table, scaling_table
from .verdicts import claims_table

REPORT = "report"
"""In the grid's folder: its report."""


def compare(root: Path, console: Console, to: Path | None = None) -> bool:
    """Write and print it all; False if all cells have ended and a claim does not hold.

    Args:
        to: the folder of the report, default `report` in the grid's.
    """
    findings, folder = find(root), to or root / REPORT
    try:
        drawn = pictures(findings)
        files = write_report(findings, drawn, folder)
    except OSError as error:
        raise SpecError(f"{folder}: {error.strerror}; give another --to") from None
    write_hparams([findings.results], root)
    write_summary_run(findings.results, figures_of(drawn), page(findings, {}))
    _print(findings, console)
    console.print(f"report:      {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    console.print(f"tensorboard: layerzoo ablate board {root}", markup=False, soft_wrap=True)
    return not findings.results.ended or all(verdict.holds for verdict in findings.verdicts)


def write_report(findings: Findings, drawn: Mapping[str, Picture], folder: Path) -> list[Path]:
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
    text = page(findings, drawn)
    text_file.write_text(text, encoding="utf-8")
    svgs = {f"figures/{name}.svg": (folder / "figures" / f"{name}.svg") for name in drawn}
    inside = {name: path.read_text(encoding="utf-8") for name, path in svgs.items()}
    html_file.write_text(as_html(findings.results.name, text, inside), encoding="utf-8")
    write_json(folder / "summary.json", summary(findings))
    return [text_file, html_file, folder / "summary.json", *write_data(findings.results, folder)]


def _print(findings: Findings, console: Console) -> None:
    results = findings.results
    console.print(results_table(findings, findings.rows, results.name))
    if findings.groups:
        name = f"{results.name} by {', '.join(results.report.by)}"
        console.print(results_table(findings, findings.groups, name))
    missing = partial(findings)
    for line in (*notes(findings), *doubts(findings), *([missing] if missing else [])):
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
