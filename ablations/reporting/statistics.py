"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean, and half the width of its confidence interval (nan for a single value)."""

    mean: float
    half: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and Student's t interval: mean ± t_{n-1} s / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan)
    if n == 1:
        return Estimate(float(values[0]), math.nan)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(
        float(np.mean(values)), float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread
    )


def window_bound(ceiling: float, chance: float, queries: float) -> tuple[float, float]:
    """The expected accuracy of a model that answers what its window shows it and guesses the
    rest, `ceiling + (1 - ceiling) chance`, and the standard error of a measured one."""
    bound = ceiling + (1 - ceiling) * chance
    return bound, math.sqrt(bound * (1 - bound) / queries)
