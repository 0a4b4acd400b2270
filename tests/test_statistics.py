"""Intervals, paired tests and corrections against closed forms, scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from layerzoo.ablations.reporting.statistics import (
    holm_corrected,
    mean_interval,
    paired_difference,
)

SEVEN = (0.02, -0.01, 0.05, 0.03, 0.04, 0.01, 0.06)
TWELVE = (0.9, 0.1, 0.2, 0.15, 0.12, 0.18, 0.11, 0.22, 0.05, 0.3, 0.14, 0.16)


def test_three_differences_by_hand() -> None:
    # Mean 2, s = 1, so t = 2 sqrt(3); the t distribution of 2 degrees of freedom has closed forms:
    # P(|t| > x) = 1 - x / sqrt(2 + x^2), and its 97.5% quantile is .95 / sqrt(2 * .025 * .975).
    difference = paired_difference([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert difference.mean == 2.0
    assert difference.half == pytest.approx(0.95 / math.sqrt(2 * 0.025 * 0.975) / math.sqrt(3))
    assert difference.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert difference.pairs == 3 and difference.interval is None


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("values", [SEVEN, TWELVE])
def test_paired_agrees_with_scipy(values: tuple[float, ...], confidence: float) -> None:
    difference = paired_difference(values, confidence)
    other = np.linspace(0.3, 0.8, len(values))
    reference = stats.ttest_rel(other + values, other)
    low, high = reference.confidence_interval(confidence)
    assert difference.p == pytest.approx(reference.pvalue)
    assert difference.mean - difference.half == pytest.approx(low)
    assert difference.mean + difference.half == pytest.approx(high)
    assert difference[:2] == mean_interval(values, confidence)[:2]


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([], None),
        ([0.1], None),
        ([0.0], None),
        ([0.1, 0.1, 0.1], None),
        ([0.3 - 0.2, 0.2 - 0.1, 0.8 - 0.7], None),  # equal but for rounding
        ([-0.5] * 12, None),
        ([0.0, 0.0, 0.0], 1.0),
        ([0.0] * 12, 1.0),
    ],
)
def test_no_test_without_spread(values: list[float], p: float | None) -> None:
    difference = paired_difference(values)
    assert difference.p == p
    assert difference.pairs == len(values) and difference.interval is None
    assert math.isnan(difference.half) == (len(values) < 2)


def test_the_bootstrap_begins_at_ten_pairs() -> None:
    assert paired_difference(TWELVE[:9]).interval is None
    assert paired_difference(TWELVE[:10]).interval is not None


def test_the_bootstrap_is_corrected_for_bias_and_repeats() -> None:
    difference = paired_difference(TWELVE)
    assert difference == paired_difference(TWELVE)
    low, high = difference.interval or (math.nan, math.nan)
    bca = stats.bootstrap((TWELVE,), np.mean, method="BCa", rng=7, n_resamples=50_000)
    plain = stats.bootstrap((TWELVE,), np.mean, method="percentile", rng=7, n_resamples=50_000)
    assert (low, high) == pytest.approx(bca.confidence_interval, abs=0.015)
    # One large value skews it to the right; percentiles leave that out.
    assert high > plain.confidence_interval.high + 0.03


HOLM = [  # by hand: sorted, times m, m - 1, .., 1, each at least the one before, at most 1
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.3, 0.4], [0.6, 0.6]),
    ([0.02], [0.02]),
    ([0.6, 0.9], [1.0, 1.0]),
    ([0.01, None, 0.02], [0.03, None, 0.04]),  # three in the family, though one has no test
    ([None, None], [None, None]),
    ([], []),
]


@pytest.mark.parametrize(("p", "corrected"), HOLM)
def test_holm_by_hand(p: list[float | None], corrected: list[float | None]) -> None:
    assert [c is None for c in holm_corrected(p)] == [c is None for c in corrected]
    given = [c for c in holm_corrected(p) if c is not None]
    assert given == pytest.approx([c for c in corrected if c is not None])


def test_holm_agrees_with_statsmodels() -> None:
    p = np.random.default_rng(0).uniform(0, 0.2, 12).tolist()
    assert holm_corrected(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())
    assert holm_corrected([*p, None]) == [*holm_corrected([*p, 1.0])[:-1], None]
