"""One token, for decoding: S' = D S + k^T v, o = scale q S'. The state moves once each way."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import launch
from .scan import FLOOR


@triton.jit
def step(
    q, k, v, g, S, o, new, gb, gh, scale, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program: BV columns of the state [K, V] of one (b, h). q, k: [B, H, K]; v, o: [B, H, V]; g
    of strides gb, gh, 1 or None."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    rows, cols = tl.arange(0, BK), (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    in_rows, in_cols = rows < K, cols < V
    seen = in_rows[:, None] & in_cols[None, :]
    tile = bh * K * V + rows[:, None] * V + cols[None, :]
    state = tl.load(S + tile, mask=seen, other=0.0)
    qs = tl.load(q + bh * K + rows, mask=in_rows, other=0.0).to(tl.float32)
    ks = tl.load(k + bh * K + rows, mask=in_rows, other=0.0).to(tl.float32)
    vs = tl.load(v + bh * V + cols, mask=in_cols, other=0.0).to(tl.float32)
    if g is not None:
        g += (bh // H) * gb + (bh % H) * gh
        if VECTOR:
            decay = tl.load(g + rows, mask=in_rows, other=0.0)
            state *= tl.exp(tl.maximum(decay, FLOOR))[:, None]
        else:
            state *= tl.exp(tl.maximum(tl.load(g), FLOOR))
    state += ks[:, None] * vs[None, :]
    tl.store(new + tile, state, mask=seen)
    out = scale * tl.sum(qs[:, None] * state, 0)
    tl.store(o + bh * V + cols, out.to(o.dtype.element_ty), mask=in_cols)


def settings(K: int, V: int, on: Any) -> dict[str, int]:
    """Tiles of up to 8192 elements, whole rows where they fit: 32 loads of 16 bytes a thread."""
    BK, BV = (launch.power_of_two(n, 1) for n in (K, V))
    BV = min(BV, max(16, 8192 // BK))
    return {"BK": BK, "BV": BV, "num_warps": 4 if BK * BV >= 4096 else 2, "num_stages": 1}
