"""The page of a grid's report, in markdown: what ran, what it found, how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .findings import (
    Findings,
    doubts,
    missing_results,
    rerun_command,
    shared_window_bound,
    summary_line,
)
from .formats import escape_markdown, markdown_table
from .plots import ReportPlot
from .scaling import FittedLaw
from .statistics import SUCCESS_ACCURACY
from .tables import (
    claims_table,
    confounds_table,
    continual_table,
    contrasts_table,
    results_table,
    scaling_table,
    tuned_table,
    unfinished_table,
)

INTERVALS_NOTE = (
    "± is the half width of a 95% interval of the mean over seeds (Student's t); a single seed "
    "has none."
)
CONTRASTS_NOTE = (
    "Differences are first minus second, of cells of the same seed; ± is the 95% t interval of "
    "their mean, p is from the paired t test. Holm p is corrected for all contrasts of this "
    "figure; *higher* or *lower* is the first arm where it is below 0.05, and *not told apart* "
    "says nothing of equality. The intervals are not corrected. With fewer than 6 pairs no rank "
    "test can give p < 0.05; the t test can, as far as the differences are normal."
)
SCALING_NOTE = (
    "Each form is fitted to all sizes, in logs with Huber's loss; its held-out miss is the mean "
    "factor, less 1, by which a fit without the largest sizes misses these. The best form has "
    "the smallest miss. Intervals are of a bootstrap of whole arms with their seeds."
)


def markdown_page(findings: Findings, pictures: Mapping[str, ReportPlot]) -> str:
    """The whole report; its figures lie in figures/, beside it."""
    blocks = [*_opening(findings)]
    for title, section in (
        ("Results", _results_section(findings)),
        ("Contrasts", _contrasts_section(findings)),
        ("What else differs", _confounds_section(findings)),
        ("Curves", iter(())),
        ("Continual learning", _continual_section(findings)),
        ("Scaling", _scaling_section(findings, pictures)),
        ("Claims", _claims_section(findings)),
        ("Cells", _cells_section(findings)),
    ):
        key = title.split()[0].lower()
        found = [*section, *(_image(n, p) for n, p in pictures.items() if p.section == key)]
        if found:
            blocks += [f"## {title}", *found]
    return "\n\n".join(blocks) + "\n"


def _opening(findings: Findings) -> Iterator[str]:
    results = findings.results
    yield f"# {escape_markdown(results.name)}"
    if results.question:
        yield escape_markdown(results.question)
    if missing := missing_results(findings):
        yield f"**{escape_markdown(missing)}**"
    yield escape_markdown(summary_line(findings))
    yield f"`{rerun_command(results)}` runs it again."
    for line in doubts(findings):
        yield f"**{escape_markdown(line)}**"


def _results_section(findings: Findings) -> Iterator[str]:
    yield markdown_table(results_table(findings, findings.rows, ""))
    yield " ".join((INTERVALS_NOTE, *map(escape_markdown, results_notes(findings))))
    if findings.groups:
        by = escape_markdown(", ".join(findings.results.report.by))
        yield f"By {by}, of each seed the mean over the arms, so that seeds are counted:"
        yield markdown_table(results_table(findings, findings.groups, ""))
    if tuned := tuned_table(findings):
        yield "Tuned, on other seeds and the validation split:"
        yield markdown_table(tuned)


def results_notes(findings: Findings) -> list[str]:
    """What the numbers of the table mean."""
    rows, lines = findings.rows, []
    figures = {name for row in rows for cell in row.cells for name in cell.metrics}
    accuracies = [row for row in rows if row.scores]
    if accuracies:
        lines.append(
            f"≥{SUCCESS_ACCURACY:.0%}: the seeds that reach it; recall is bimodal over seeds."
        )
    if "recall/ceiling" in figures:
        whose = "the arm's own" if findings.reach is None else "the window arm's"
        lines.append(f"Ceiling: the queries whose value is within {whose} reach.")
    if "recall/beyond_window" in figures:
        lines.append("Beyond window: the accuracy on all other queries.")
    if bound := shared_window_bound(rows):
        lines.append(
            f"A model that answers all that its window shows and guesses the rest recalls "
            f"{bound[0]:.1%} (standard error of one run {bound[1]:.1%})."
        )
    if length := next((c.metrics["length"] for row in rows for c in row.cells), None):
        lines.append(f"State: bytes of all layers after {length} tokens, batch 1, float32.")
    return lines + _matched_notes(findings)


def _matched_notes(findings: Findings) -> list[str]:
    """What the arms were matched by, and how well."""
    found = {cell.arm: cell.matched for cell in findings.results.cells if cell.matched}
    if not found:
        return []
    first = next(iter(found.values()))
    worst = max(found, key=lambda arm: abs(found[arm]["deviation"]))
    return [
        f"Matched by {first['by']} to {first['target']:,.0f}; the farthest is {worst}, "
        f"{found[worst]['achieved']:,.0f} ({found[worst]['deviation']:+.1%})."
    ]


def _contrasts_section(findings: Findings) -> Iterator[str]:
    for name, family in findings.contrasts.items():
        yield f"Of {escape_markdown(name)}:"
        yield markdown_table(contrasts_table(name, family))
    if findings.contrasts:
        base = findings.results.report.baseline
        told = "" if base is None else f"The baseline is {escape_markdown(base)}. "
        yield told + CONTRASTS_NOTE
        if any(row.diverged or row.failed for row in findings.rows):
            yield "An arm whose cells diverged or failed is compared at the seeds that it has."


def _confounds_section(findings: Findings) -> Iterator[str]:
    found = findings.confounds
    if table := confounds_table(findings):
        yield markdown_table(table)
    if found.notes:
        yield " ".join(map(escape_markdown, found.notes))
    for line in found.warnings:
        yield f"**warning: {escape_markdown(line)}**"


def _continual_section(findings: Findings) -> Iterator[str]:
    if table := continual_table(findings.rows):
        yield markdown_table(table)


def _scaling_section(findings: Findings, pictures: Mapping[str, ReportPlot]) -> Iterator[str]:
    for n, law in enumerate(findings.results.report.scaling, 1):
        fits = [fit for fit in findings.laws if fit.law is law]
        table = scaling_table(fits)
        yield f"{escape_markdown(law.y)} against {escape_markdown(' and '.join(law.x))}:"
        if table.row_count:
            yield markdown_table(table)
        told = [line for fit in fits for line in scaling_notes(fit)]
        if told:
            yield "\n".join(f"- {escape_markdown(line)}" for line in told)
        if picture := pictures.get(f"scaling-{n}"):
            yield _image(f"scaling-{n}", picture)
    if findings.laws:
        yield SCALING_NOTE


def scaling_notes(fit: FittedLaw) -> list[str]:
    """What a fit does not use, and why it is refused."""
    name = fit.group or fit.law.y
    lines = [f"{name}: {count} cells left out: {why}." for why, count in fit.left_out.items()]
    if fit.scaling is None:
        lines.append(f"{name}: no exponent: no cell to fit.")
    elif fit.scaling.refused:
        lines.append(f"{name}: no exponent: {fit.scaling.refused}.")
    return lines


def _claims_section(findings: Findings) -> Iterator[str]:
    if findings.verdicts:
        yield markdown_table(claims_table(findings.verdicts))


def _cells_section(findings: Findings) -> Iterator[str]:
    table = unfinished_table(findings)
    if table is None:
        yield f"All {len(findings.results.cells)} cells finished."
    else:
        yield markdown_table(table)


def _image(name: str, picture: ReportPlot) -> str:
    return f"![{escape_markdown(picture.caption)}](figures/{name}.svg)"
