"""Differences of arms, paired by seed, and what may be said of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..cells.report import Contrast
from .results import Results
from .rows import differences
from .statistics import Difference, holm, paired

LEVEL = 0.05
"""Of the test: a difference whose corrected p is below it is told apart from 0."""


@dataclass(frozen=True)
class Compared:
    """A contrast as measured. holm: its p, corrected for all contrasts of the same figure."""

    contrast: Contrast
    difference: Difference
    holm: float | None

    @property
    def words(self) -> str:
        """higher, lower, not told apart; - if there is no test."""
        if self.holm is None:
            return "-"
        if self.holm >= LEVEL:
            return "not told apart"
        return "higher" if self.difference.mean > 0 else "lower"


def compared(results: Results, name: str | None) -> list[Compared]:
    """All contrasts of a figure, None for the headline: a family, over which p is corrected."""
    contrasts = results.report.contrasts
    found = [paired(differences(results.cells, each.pairs, name)) for each in contrasts]
    corrected = holm([difference.p for difference in found])
    return [Compared(*each) for each in zip(contrasts, found, corrected, strict=True)]
