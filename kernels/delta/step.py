"""One token of the delta rule: the state is read once and written once, to another place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(
    q, k, v, beta, g, state, o, end, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """S' = D S, S'' = S' + beta k^T (v - k S'), o = scale q S'': a program does BV columns of one
    head's state, `[K, BV]`."""
    blocks: tl.constexpr = V // BV
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.arange(0, K)
    c = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    place = bh * K * V + d[:, None] * V + c[None, :]
    S = tl.load(state + place)
    ks = tl.load(k + bh * K + d).to(tl.float32)
    qs = tl.load(q + bh * K + d).to(tl.float32)
    vs = tl.load(v + bh * V + c).to(tl.float32)
    if DECAY == 1:
        S *= tl.exp(tl.load(g + bh))
    elif DECAY == 2:
        S *= tl.exp(tl.load(g + bh * K + d))[:, None]
    u = (vs - tl.sum(ks[:, None] * S, 0)) * tl.load(beta + bh)
    S += ks[:, None] * u[None, :]
    tl.store(end + place, S)
    out = tl.sum(qs[:, None] * S, 0) * scale
    tl.store(o + bh * V + c, out.to(o.dtype.element_ty))
