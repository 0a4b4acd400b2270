"""What of a grid is compared in TensorBoard."""

from __future__ import annotations

from ..results import Results
from ..rows import ACCURACIES

FIGURES = (*ACCURACIES, "recall/beyond_window", "loss/held_out")
SIZES = ("parameters", "state_bytes")


def measures(results: Results) -> list[str]:
    """Figures: the headline, what most tasks have, and those of the scaling laws."""
    report = results.report
    headline = () if report.metric is None else (report.metric,)
    return [*dict.fromkeys((*headline, *FIGURES, *(law.y for law in report.scaling)))]


def sizes(results: Results) -> list[str]:
    """Sizes: what all cells have, and those of the scaling laws."""
    return [*dict.fromkeys((*SIZES, *(x for law in results.report.scaling for x in law.x)))]
