"""Sums of log decays by products with ones, of float16 in two parts where inputs have 16 bits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..tiles import LOG2E

FLOOR = tl.constexpr(-40.0)
LOG2 = LOG2E
UNIT = tl.constexpr(1024.0)
"""Log decays times this are well inside float16: 40 log2 e UNIT < 65504."""


@triton.jit
def pieces(g) -> Any:
    """g as a high and a low part of float16, times UNIT."""
    g = g * UNIT
    high = g.to(tl.float16)
    return high, (g - high.to(tl.float32)).to(tl.float16)


@triton.jit
def ones(where, like):
    """What sums `like` by a product: 1 / UNIT for pieces."""
    if like.dtype == tl.float32:
        m = where.to(tl.float32)
    else:
        m = tl.where(where, 1 / UNIT, 0.0).to(tl.float16)
    return m
