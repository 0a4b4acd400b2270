"""What of a grid is compared in TensorBoard."""

from __future__ import annotations

from ..results import GridResults
from ..rows import ACCURACIES

USUAL_METRICS = (*ACCURACIES, "recall/beyond_window", "loss/held_out")
USUAL_SIZES = ("parameters", "state_bytes")


def compared_metrics(results: GridResults) -> list[str]:
    """Figures: the headline, what most tasks have, and those of the scaling laws."""
    report = results.report
    headline = () if report.metric is None else (report.metric,)
    return [*dict.fromkeys((*headline, *USUAL_METRICS, *(law.y for law in report.scaling)))]


def compared_sizes(results: GridResults) -> list[str]:
    """Sizes: what all cells have, and those of the scaling laws."""
    return [*dict.fromkeys((*USUAL_SIZES, *(x for law in results.report.scaling for x in law.x)))]
