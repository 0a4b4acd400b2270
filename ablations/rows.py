"""An arm of a grid, as its finished cells measured it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .statistics import Estimate, mean_interval


@dataclass(frozen=True)
class Row:
    """An arm's metrics over its seeds."""

    arm: str
    options: dict[str, str]
    seeds: list[int]
    metrics: list[dict[str, Any]]

    def values(self, name: str) -> list[float]:
        return [m[name] for m in self.metrics if m.get(name) is not None]

    @property
    def headline(self) -> str:
        """The name of the accuracy that the arm's task has."""
        names = ("recall/accuracy", "accuracy/all")
        return next((name for name in names if self.values(name)), names[0])

    def estimate(self, name: str) -> Estimate:
        return mean_interval(self.values(name))

    def lags(self) -> dict[int, Estimate]:
        """Recall by the lower edge of the lag's bin."""
        names = {n for m in self.metrics for n in m if re.fullmatch(r"recall_lag/\d+", n)}
        edges = sorted(int(name.split("/")[1]) for name in names)
        return {edge: self.estimate(f"recall_lag/{edge}") for edge in edges}
