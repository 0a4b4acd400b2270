"""The rule for low precision, of layers and of kernels.

An implementation may be wrong by at most twice what the reference is wrong by in the same
precision. Both errors are measured against float64.

What one run of a reference is wrong by is luck: another CPU adds in another order, and a few
numbers may round to exact ones. So an error is a root mean square over draws, which have other
weights or other roundings, relative to the size of the exact numbers over the same draws. (A
single draw whose sums nearly cancel has a large relative error that says little.)

Two allowances remain:

- The error of n numbers is an estimate, whose own deviation is about 1 / sqrt(2 n) of it. What is
  judged is granted five of these.
- A reference may have hardly an error, where its sums begin with their small terms. A sum of n
  terms that begins with its largest is off by up to half a unit in the last place at each step,
  and so by about sqrt(n / 12) units. What is judged is granted as much in float32, and at least
  one unit.

A product in TF32 or bfloat16, a sum in the wrong dtype and a forgotten upcast are far beyond:
tests/kernels/test_precision.py plants them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layerzoo.testing.check import require

DRAWS = 5
ULP = torch.finfo(torch.float32).eps
LUCK = 5 / math.sqrt(2)


class Error(NamedTuple):
    """The norm of an error, the norm of the exact numbers, and how many numbers there are."""

    error: float
    size: float
    entries: int


def errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Error]:
    """The error of each leaf.

    A leaf that must be zero (the gradient of a softmax over one key), or nearly zero after a
    reset, is measured against the norm of all leaves.
    """
    require(got.keys() == want.keys(), f"it has {[*got]}, and should have {[*want]}")
    total = math.hypot(*(float(x.norm()) for x in want.values()))
    least = torch.finfo(torch.float64).eps * total
    found = {}
    for name, exact in want.items():
        mine, theirs = [*got[name].shape], [*exact.shape]
        require(mine == theirs, f"{name} is {mine}, and should be {theirs}")
        error = float((got[name].double().to(exact.device) - exact).norm())
        size = float(exact.norm())
        found[name] = Error(error, size if size > least else total, exact.numel())
    return found


def pooled(draws: Sequence[Mapping[str, Error]]) -> dict[str, float]:
    """The relative error of each leaf over the draws; a NaN counts as infinite."""
    found = {}
    for name in draws[0]:
        error = math.hypot(*(draw[name].error for draw in draws))
        size = math.hypot(*(draw[name].size for draw in draws))
        wrong = math.isnan(error) or (error > 0 and size == 0)
        found[name] = math.inf if wrong else error / (size or 1.0)
    return found


def check_precision(
    made: Sequence[Mapping[str, Error]],
    reference: Sequence[Mapping[str, Error]],
    terms: int = 1,
) -> None:
    """Raise `Broken` where an implementation is wrong by more than is allowed.

    Args:
        made, reference: the errors of the implementation and of the reference, a dict a draw.
        terms: of the longest sum in the implementation.
    """
    for name, ratio in ratios(made, reference, terms).items():
        require(ratio <= 1, f"{name}: {ratio:.2f} of the error that is allowed")


def ratios(
    made: Sequence[Mapping[str, Error]],
    reference: Sequence[Mapping[str, Error]],
    terms: int = 1,
) -> dict[str, float]:
    """The error of each leaf divided by the one that is allowed."""
    found, bound = pooled(made), pooled(reference)
    least = ULP * max(1.0, math.sqrt(terms / 12))
    result = {}
    for name, error in found.items():
        require(math.isfinite(bound[name]), f"{name}: the reference itself is not finite")
        count = sum(draw[name].entries for draw in made)
        luck = 1 + LUCK / math.sqrt(count) if count else 1
        result[name] = error / (2 * bound[name] * luck + least)
    return result
