"""The rule for low precision, of kernels and of layers: an implementation is wrong by at most
twice what the low-precision reference is; both are measured against float64.

What one run of a reference is wrong by is luck: another CPU adds in another order, and a few
numbers may round to what is exact. So an error is a root mean square over draws that differ in
nothing but their roundings, or their weights, relative to that of what is exact (a draw in which
a sum happens to cancel has a large relative error, and says little); it holds on any machine. The
luck of what is judged remains: the error of n numbers is an estimate, off by its own deviation,
about 1 / sqrt(2 n) of it. It is granted five of these. And a reference may have hardly an error,
where its sums begin with their small terms. So what is judged is granted what a sum of n terms is
wrong by if it begins with its largest: each addition is off by up to half a unit in its last place
and so n of them by sqrt(n / 12) units. It is granted that of float32, and at least one unit.

All this is far from a product in TF32 or bfloat16, a sum in the wrong dtype or a forgotten upcast:
see tests/kernels/test_precision.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 5
ULP = torch.finfo(torch.float32).eps
LUCK = 5 / math.sqrt(2)


class Error(NamedTuple):
    """The norms of an error and of what is exact, and of how many numbers they are."""

    error: float
    size: float
    count: int


def errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Error]:
    """Of each leaf. One that must be zero (the gradient of a softmax over one key), or that is
    zero but for what a reset leaves of it, is measured against the norm of all."""
    assert got.keys() == want.keys()
    total = math.hypot(*(float(x.norm()) for x in want.values()))
    least = torch.finfo(torch.float64).eps * total
    found = {}
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        error = float((got[name].double().to(exact.device) - exact).norm())
        size = float(exact.norm())
        found[name] = Error(error, size if size > least else total, exact.numel())
    return found


def pooled(draws: Sequence[Mapping[str, Error]]) -> dict[str, float]:
    """The relative error of each leaf over draws, infinite where it is NaN."""
    found = {}
    for name in draws[0]:
        error = math.hypot(*(draw[name].error for draw in draws))
        size = math.hypot(*(draw[name].size for draw in draws))
        wrong = math.isnan(error) or (error > 0 and size == 0)
        found[name] = math.inf if wrong else error / (size or 1.0)
    return found


def check(
    made: Sequence[Mapping[str, Error]],
    reference: Sequence[Mapping[str, Error]],
    terms: int = 1,
) -> None:
    """Of draws of each. terms: of the longest sum of what is judged."""
    for name, ratio in ratios(made, reference, terms).items():
        assert ratio <= 1, f"{name}: {ratio:.2f} of the error that is allowed"


def ratios(
    made: Sequence[Mapping[str, Error]],
    reference: Sequence[Mapping[str, Error]],
    terms: int = 1,
) -> dict[str, float]:
    """Of the error of each leaf to the one that is allowed."""
    found, bound = pooled(made), pooled(reference)
    least = ULP * max(1.0, math.sqrt(terms / 12))
    result = {}
    for name, error in found.items():
        assert math.isfinite(bound[name]), f"{name}: the reference itself is not finite"
        count = sum(draw[name].count for draw in made)
        luck = 1 + LUCK / math.sqrt(count) if count else 1
        result[name] = error / (2 * bound[name] * luck + least)
    return result
