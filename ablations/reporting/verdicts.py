"""Whether a grid found what it claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..cells.claims import Claim
from .rows import Row
from .statistics import mean_interval, window_bound


@dataclass(frozen=True)
class Verdict:
    """A claim beside what was measured, None where nothing was."""

    claim: Claim
    expected: float | None
    measured: float | None

    @property
    def holds(self) -> bool:
        if self.expected is None or self.measured is None:
            return False
        return abs(self.measured - self.expected) <= self.claim.tolerance


def judge(claims: Sequence[Claim], rows: Sequence[Row]) -> list[Verdict]:
    arms = {row.arm: row for row in rows}
    return [_verdict(claim, arms.get(claim.arm, Row(claim.arm, {}))) for claim in claims]


def _verdict(claim: Claim, row: Row) -> Verdict:
    measured, expected = _mean(row.values(claim.metric)), claim.value
    if expected == "window_bound":
        bounds = [
            window_bound(m["recall/ceiling"], m["chance"], m["recall/queries"])[0]
            for m in (cell.metrics for cell in row.cells)
            if m.get("chance") and "recall/ceiling" in m
        ]
        return Verdict(claim, _mean(bounds), measured)
    return Verdict(claim, expected, measured)


def _mean(values: Sequence[float]) -> float | None:
    return mean_interval(values).mean if values else None


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    out = Table(title="claims, by the mean over seeds", box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(("arm", "metric", "expected", "measured", "verdict")):
        out.add_column(head, justify="right" if n in (2, 3) else "left")
    for v in verdicts:
        expected, measured = ("-" if x is None else f"{x:.3f}" for x in (v.expected, v.measured))
        within = f"{expected} ±{v.claim.tolerance:g}"
        verdict = "holds" if v.holds else "fails" if v.measured is not None else "not measured"
        out.add_row(v.claim.arm, v.claim.metric, within, measured, verdict)
    return out


def plain_verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """For summary.json."""
    return [
        {**v.claim.to_fields(), "expected": v.expected, "measured": v.measured, "holds": v.holds}
        for v in verdicts
    ]
