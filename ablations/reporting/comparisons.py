"""What may be said of arms beside each other: contrasts, confounds, and whether claims hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..cells.claims import Claim
from ..cells.confounds import NAMED_AT_MOST, ArmPair, Confounds, compared_pairs, find_confounds
from ..cells.differences import ComparedArm
from ..cells.report_options import Contrast
from ..cells.sizes import SIZE_NAMES
from ..running.folder import CONFIG
from .arm_rows import ArmRow, differences_by_seed, is_accuracy
from .results import GridResults
from .statistics import (
    SUCCESS_ACCURACY,
    PairedDifference,
    holm_corrected,
    mean_interval,
    paired_difference,
    success_rate,
    window_bound,
)

SIGNIFICANCE = 0.05
"""Of the test: a difference whose corrected p is below it is told apart from 0."""


@dataclass(frozen=True)
class MeasuredContrast:
    """A contrast as measured. holm: its p, corrected for all contrasts of the same figure."""

    contrast: Contrast
    difference: PairedDifference
    holm: float | None

    @property
    def words(self) -> str:
        """higher, lower, not told apart; - if there is no test."""
        if self.holm is None:
            return "-"
        if self.holm >= SIGNIFICANCE:
            return "not told apart"
        return "higher" if self.difference.mean > 0 else "lower"


def measure_contrasts(results: GridResults, name: str | None) -> list[MeasuredContrast]:
    """All contrasts of a figure, None for the headline: a family, over which p is corrected."""
    contrasts = results.report.contrasts
    found = [
        paired_difference(differences_by_seed(results.cells, each.pairs, name))
        for each in contrasts
    ]
    corrected = holm_corrected([difference.p for difference in found])
    return [MeasuredContrast(*each) for each in zip(contrasts, found, corrected, strict=True)]


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


def verdict_trees(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """For summary.json."""
    return [
        {**v.claim.to_fields(), "expected": v.expected, "measured": v.measured, "holds": v.holds}
        for v in verdicts
    ]


LEARNED_FACT = f"seeds that reach {SUCCESS_ACCURACY:.0%}"
LEARNED_SHARE = 0.5
"""An arm has learned if at least this share of its seeds reaches SUCCESS."""


def measured_confounds(results: GridResults, rows: Sequence[ArmRow]) -> Confounds:
    """The confounds of all arms that have a cell with a config in its folder."""
    sides: dict[str, ComparedArm] = {}
    for cell in results.cells:
        if cell.arm not in sides and (results.root / cell.path / CONFIG).is_file():
            solved = frozenset(cell.matched.get("solved", {}))
            sides[cell.arm] = ComparedArm(cell.options, results.config(cell), solved)
    measured = {row.arm: row.cells[0].metrics for row in rows if row.cells}
    figures = {
        arm: {n: found[n] for n in SIZE_NAMES if n in found} for arm, found in measured.items()
    }
    scores = {row.arm: row.scores for row in rows if row.scores and is_accuracy(row.headline)}
    learned = {arm: success_rate(values) for arm, values in scores.items()}
    for arm, share in learned.items():
        figures[arm][LEARNED_FACT] = f"{share * len(scores[arm]):.0f}/{len(scores[arm])}"
    pairs = compared_pairs(results.report, results.claims, results.arms)
    matched = results.fields.match is not None
    found = find_confounds(sides, pairs, results.axes, results.tuning, figures, matched)
    found.warnings.extend(_unlearned(pairs, learned, results.windows))
    return found


def _unlearned(
    pairs: Sequence[ArmPair], learned: Mapping[str, float], windows: Sequence[str]
) -> list[str]:
    """A line that names arms that did not learn and are compared with arms that did."""
    arms: dict[str, None] = {}
    for pair in pairs:
        if not all(arm in learned for arm in pair):
            continue
        low, high = sorted(pair, key=lambda arm: learned[arm])
        if learned[low] < LEARNED_SHARE <= learned[high] and low not in windows:
            arms[low] = None
    if not arms:
        return []
    more = f" and {len(arms) - NAMED_AT_MOST} more" if len(arms) > NAMED_AT_MOST else ""
    return [
        f"{'; '.join([*arms][:NAMED_AT_MOST])}{more}: under half of the seeds reach "
        f"{SUCCESS_ACCURACY:.0%}, and at least half do in arms that are compared with them, "
        f"so that the difference may be one of learning and not of what the rule can hold; give "
        f"more updates, another learning rate or norm before you call an arm unable"
    ]
