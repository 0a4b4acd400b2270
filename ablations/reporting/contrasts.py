"""Differences of arms, paired by seed, and what may be said of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..cells.report import Contrast
from .results import GridResults
from .rows import differences_by_seed
from .statistics import PairedDifference, holm_corrected, paired_difference

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
