"""Whether a grid found what it claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..cells.claims import Claim
from .rows import ArmRow
from .statistics import mean_interval, window_bound


@dataclass(frozen=True)
class Verdict:
    """A claim beside what was measured, None where nothing was."""

    claim: Claim
    expected: float | None
    measured: float | None

    @property
    def holds(self) -> bool:
        if self.expected is None or self.measured is None or not self.finite:
            return False
        if self.claim.tolerance == "sign":
            return self.measured * self.expected > 0
        return abs(self.measured - self.expected) <= self.claim.tolerance

    @property
    def finite(self) -> bool:
        return all(math.isfinite(x) for x in (self.expected, self.measured) if x is not None)

    @property
    def word(self) -> str:
        """holds, fails, not measured, or not finite: nothing is claimed of nan or inf."""
        if self.holds:
            return "holds"
        if self.measured is None:
            return "not measured"
        return "fails" if self.finite else "not finite"

    @property
    def shown(self) -> tuple[str, str]:
        """Expected and measured, as tables show them: a difference with its sign."""
        form = "{:.3f}" if self.claim.minus is None else "{:+.3f}"
        expected, measured = (
            "-" if x is None else form.format(x) for x in (self.expected, self.measured)
        )
        return expected, measured

    @property
    def tolerance(self) -> str:
        """As tables show it: ±0.05, or sign."""
        allowed = self.claim.tolerance
        return allowed if isinstance(allowed, str) else f"±{allowed:g}"


def judge_claims(claims: Sequence[Claim], rows: Sequence[ArmRow]) -> list[Verdict]:
    arms = {row.arm: row for row in rows}
    return [_judge_claim(claim, arms) for claim in claims]


def _judge_claim(claim: Claim, arms: Mapping[str, ArmRow]) -> Verdict:
    row = arms.get(claim.arm, ArmRow(claim.arm, {}))
    measured, expected = _mean_or_none(row.values(claim.metric)), claim.value
    if claim.minus is not None:
        other = _mean_or_none(arms.get(claim.minus, ArmRow(claim.minus, {})).values(claim.metric))
        measured = None if measured is None or other is None else measured - other
    if expected == "window_bound":
        bounds = [
            window_bound(m["recall/ceiling"], m["chance"], m["recall/queries"])[0]
            for m in (cell.metrics for cell in row.cells)
            if m.get("chance") and "recall/ceiling" in m
        ]
        return Verdict(claim, _mean_or_none(bounds), measured)
    return Verdict(claim, expected, measured)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return mean_interval(values).mean if values else None


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    out = Table(title="claims, by the mean over seeds", box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(("arm", "metric", "expected", "measured", "verdict")):
        out.add_column(head, justify="right" if n in (2, 3) else "left")
    for v in verdicts:
        expected, measured = v.shown
        within = f"{expected} {v.tolerance}"
        out.add_row(v.claim.subject, v.claim.metric, within, measured, v.word)
    return out


def verdict_trees(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """For summary.json."""
    return [
        {**v.claim.to_fields(), "expected": v.expected, "measured": v.measured, "holds": v.holds}
        for v in verdicts
    ]
