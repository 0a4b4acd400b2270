"""A decay per token and key channel inside the chunks of linear attention and the delta rule.

With G_t the sum of the log decays of a chunk through token t, and Z_i its last value, `forward`
prepares for each chunk of C tokens all that is not the state's:

    scores[i, j] = sum_c x_i,c k_j,c e^(G_i,c - G_j,c)      x is q, j <= i; or x is k, j < i
    reads[i] = x_i e^(G_i),    fades[j] = k_j e^(Z - G_j),    whole = e^Z

and `backward` gives the gradients of q, k and g. e^(G_i) e^(-G_j) may overflow. Where it does not,
`mild` computes it all by few products; the chunks in which it may it flags, and `strong`, which
comes after it, does those again, and all of float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import launch
from . import mild, pieces, strong


class Prepared(NamedTuple):
    """scores: of each part `[B, T, H, C]`, zero where unseen. reads: of each part
    `[B, T, H, K]`. fades `[B, T, H, K]`. All in the dtype of q. whole: `[B, N, H, K]` float32."""

    scores: tuple[Tensor, ...]
    reads: tuple[Tensor, ...]
    fades: Tensor
    whole: Tensor


def forward(rows: tuple[Tensor, ...], k: Tensor, g: Tensor, C: int) -> Prepared:
    """Prepare all chunks of C tokens. rows: (q,), or (q, k) with the very k.

    q, k `[B, T, H, K]` of one dtype; g `[B, T, H, K]` float32, natural logarithms <= 0, clamped
    here at FLOOR, -inf included. K: a power of two of at least 16, as is C.
    """
    q, k, g = (x.contiguous() for x in (rows[0], k, g))
    B, T, H, K = q.shape
    N, parts = (T + C - 1) // C, len(rows)
    scores = [launch.empty((B, T, H, C), like=q) for _ in rows]
    reads = [launch.empty((B, T, H, K), like=q) for _ in rows]
    fades = launch.empty((B, T, H, K), like=q)
    whole = launch.empty((B, N, H, K), like=q, dtype=torch.float32)
    s = settings(parts, C, K, q.dtype, launch.target(q.device))
    args = (q, k, g, scores[0], scores[-1], reads[0], reads[-1], fades, whole)
    const = {"H": H, "K": K, "C": C, "PARTS": parts, "REACH": reach(q.dtype)}
    items, flags, group = B * H * N, None, 1
    if s.mild:
        flags = launch.empty((items,), like=q, dtype=torch.int32)
        tile = {"BK": s.mild, "num_warps": s.warps, "num_stages": s.stages}
        sums = matrices(C, q.dtype, q.device)
        launch.launch(mild.mild_forward, (items,), *args, flags, sums[0], T, **const, **tile)
        group = grouped(items, q)
    launch.launch(
        strong.strong_forward, (-(-items // group),), *args, flags, items, T,
        BK=s.strong, GROUP=group,
        PRECISION=launch.precision(q.dtype), num_warps=4, num_stages=1, **const,
    )  # fmt: skip
    return Prepared(tuple(scores), tuple(reads), fades, whole)


def backward(
    rows: tuple[Tensor, ...],
    k: Tensor,
    g: Tensor,
    C: int,
    d_scores: tuple[Tensor, ...],
    d_reads: tuple[Tensor, ...],
    d_fades: Tensor,
    d_whole: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_q, d_k, d_g): d_k of the keys and, where rows are (q, k), of k as a row, added. d_g in
    float32, zero where g is below FLOOR. Gradients of scores count where tokens are seen."""
    q, k, g = (x.contiguous() for x in (rows[0], k, g))
    B, T, H, K = q.shape
    N, parts = (T + C - 1) // C, len(rows)
    d_s, d_r = ([x.contiguous() for x in xs] for xs in (d_scores, d_reads))
    d_q, d_k, d_g = (launch.empty((B, T, H, K), like=x) for x in (q, k, g))
    s = settings_backward(parts, C, K, q.dtype, launch.target(q.device))
    args = (q, k, g, d_s[0], d_s[-1], d_r[0], d_r[-1], d_fades.contiguous(),
            d_whole.contiguous(), d_q, d_k, d_g)  # fmt: skip
    const = {"H": H, "K": K, "C": C, "PARTS": parts, "REACH": reach(q.dtype)}
    items, flags, group, per = B * H * N * (K // s.strong), None, 1, 1
    if s.mild:
        blocks, per = B * H * N * (K // s.span), s.span // s.strong
        flags = launch.empty((blocks,), like=q, dtype=torch.int32)
        tile = {"BK": s.mild, "num_warps": s.warps, "num_stages": s.stages}
        sums = matrices(C, q.dtype, q.device)
        tile["SPAN"] = s.span
        launch.launch(mild.mild_backward, (blocks,), *args, flags, *sums, T, **const, **tile)
        group = grouped(items, q)
    launch.launch(
        strong.strong_backward, (-(-items // group),), *args, flags, items, T,
        BK=s.strong, GROUP=group,
        PER=per, PRECISION=launch.precision(q.dtype), num_warps=4, num_stages=1, **const,
    )  # fmt: skip
    return d_q, d_k, d_g


def reach(dtype: torch.dtype) -> int:
    """The exponents of 2 that factors may have either way: no number overflows, and no gradient
    of ordinary size underflows; less than those of FLOOR. 0 in float32, whose digits they would
    cost."""
    return {torch.float32: 0, torch.float16: 4}.get(dtype, 57)


@functools.cache
def matrices(C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """What sums over the tokens through each, of float16 and of UNIT; over those from it on; and
    over those before it. Programs read them: to make them takes more instructions."""
    ones = torch.ones(C, C, device=device)
    through = (ones.tril() / pieces.UNIT.value).half()
    return through, ones.triu().to(dtype), ones.tril(-1).to(dtype)


def grouped(items: int, like: Tensor) -> int:
    """Items of a program of `strong`, which mostly finds nothing to do."""
    programs = 4 * launch.target(like.device).multiprocessors
    return min(32, launch.power_of_two(-(-items // programs), 1))


class Settings(NamedTuple):
    """mild, strong: channels at a time of the two kernels; mild of 0: all is done by the other.
    warps and stages of mild. span: all channels of a program of its backward pass."""

    mild: int
    strong: int
    warps: int
    stages: int
    span: int = 0


def settings(parts: int, C: int, K: int, dtype: torch.dtype, target: launch.Target) -> Settings:
    """Of the forward pass, loops over blocks of channels."""
    if dtype == torch.float32:
        return Settings(0, min(K, 32), 4, 1)
    small = target.backend == "cuda" and int(target.arch) < 90
    return Settings(min(K, 64), min(K, 32 if small or parts == 2 else 64), 4, 1)


def settings_backward(
    parts: int, C: int, K: int, dtype: torch.dtype, target: launch.Target
) -> Settings:
    """Of the backward pass, a program for each block of channels."""
    if dtype == torch.float32:
        return Settings(0, min(K, 32), 4, 1)
    small = target.backend == "cuda" and int(target.arch) < 90
    return Settings(min(K, 32), min(K, 16 if small or parts == 2 else 32), 4, 1, min(K, 128))
