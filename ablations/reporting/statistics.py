"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from layerzoo.metrics import SuccessRate

from .power_laws import Array

BOOTSTRAP_PAIRS = 10
"""From so many pairs on there is a bootstrap interval; of fewer it is too narrow."""

SUCCESS_ACCURACY = 0.9
"""Recall is bimodal over seeds (a phase transition), so the share above this is shown too."""


class Estimate(NamedTuple):
    """A mean, and half the width of its confidence interval (nan where there is none: for a
    single value, or beside one that is not finite). n: how many values; of none, both are nan."""

    mean: float
    half: float
    n: int = 1


def mean_of(values: Sequence[float]) -> float:
    """Of at least one value; of one that is not finite it is not finite either."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.mean(values))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and Student's t interval: mean ± t_{n-1} s / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    if n == 1:
        return Estimate(float(values[0]), math.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread
    return Estimate(mean_of(values), half, n)


def success_rate(accuracies: Sequence[float]) -> float:
    """The share of the runs that reach SUCCESS."""
    metric = SuccessRate(SUCCESS_ACCURACY)
    metric.update(torch.tensor(accuracies, dtype=torch.float64))
    return float(metric.compute())


class PairedDifference(NamedTuple):
    """The mean of paired differences.

    half: half the width of its t interval. p: of the two-sided paired t test, None without a test.
    interval: its bootstrap interval, None without one.
    """

    mean: float
    half: float
    p: float | None
    pairs: int
    interval: tuple[float, float] | None


def paired_difference(differences: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """What paired differences say: Student's t interval and test of their mean.

    The t test, since no rank test of 5 pairs can give p < .05 (signed ranks: 2 / 2^5 = .0625).
    There is none of fewer than 2 pairs, nor with a difference that is not finite, nor of
    differences that are all equal: their spread estimates the error as 0, so that any mean would
    have p = 0. If all are 0, p = 1.
    The bootstrap interval (BCa, bias-corrected and accelerated, Efron 1987; always the same draws)
    is there from 10 pairs on, if they differ.
    """
    n, values = len(differences), np.asarray(differences, dtype=np.float64)
    mean, half, _ = mean_interval(differences, confidence)
    if not np.isfinite(values).all():
        return PairedDifference(mean, half, None, n, None)
    # Differences of floats that are equal but for rounding have no spread either.
    if n < 2 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return PairedDifference(mean, half, None if n < 2 or values.any() else 1.0, n, None)
    interval = None
    if n >= BOOTSTRAP_PAIRS:
        found = stats.bootstrap(
            (values,), np.mean, confidence_level=confidence, method="BCa", rng=0
        )
        low, high = found.confidence_interval
        interval = float(low), float(high)
    _, p = np.array(stats.ttest_1samp(values, 0.0)).tolist()
    return PairedDifference(mean, half, p, n, interval)


def holm_corrected(p: Sequence[float | None]) -> list[float | None]:
    """p values after Holm's correction (1979) for the size of their family.

    The k-th smallest of m is multiplied by m - k + 1, is at least the one before and at most 1. A
    None, a contrast without a test, counts as 1 and stays None.
    """
    given = np.array([1.0 if one is None else one for one in p])
    order = np.argsort(given)
    corrected = np.empty_like(given)
    steps = np.maximum.accumulate(given[order] * np.arange(len(p), 0, -1))
    corrected[order] = np.minimum(steps, 1.0)
    pairs = zip(p, corrected.tolist(), strict=True)
    return [None if one is None else c for one, c in pairs]


def window_bound(ceiling: float, chance: float, queries: float) -> tuple[float, float]:
    """The expected accuracy of a model that answers what its window shows it and guesses the
    rest, `ceiling + (1 - ceiling) chance`, and the standard error of a measured one."""
    bound = ceiling + (1 - ceiling) * chance
    return bound, math.sqrt(bound * (1 - bound) / queries) if queries else math.nan


def draw_resamples(
    configurations: int, least: int, resamples: int, rng: np.random.Generator
) -> Array:
    """How often each configuration is drawn [resamples, configurations], with `least` or more
    different ones in each."""
    draws: list[np.ndarray] = []
    while len(draws) < resamples:
        drawn = rng.integers(configurations, size=configurations)
        times = np.bincount(drawn, minlength=configurations)
        if np.count_nonzero(times) >= least:
            draws.append(times)
    return np.array(draws, dtype=np.float64)
