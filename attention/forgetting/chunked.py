"""The fast form of forgetting attention in PyTorch: blocks of queries, with its own backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.ops import once_differentiable

if TYPE_CHECKING:
    pass


BLOCK = 128
"""Queries that are worked off at once: what is as long as their keys stays in the cache."""


def run(q, k, v, log_forget, *, window, scale):
    """See `forgetting_attention`."""
    if q.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    sums = log_forget.double().cumsum(1)
    # Contiguous, for a batched product of strided matrices is several times as slow on a CPU.
    heads_first = (t.transpose(1, 2).contiguous() for t in (q, k, v, sums))
    return Blocks.apply(*heads_first, window or k.shape[1], scale).transpose(1, 2)


class Blocks(torch.autograd.Function):
    """q `[B, H, T, K]`, k, v `[B, G, n, K | V]` and sums `[B, H, n]` in float64 -> `[B, H, T, V]`.

    Blocks of queries after one another, each over the keys that one of them sees: a bias of a
    block and its keys is all that is ever there, and the backward pass makes it again. The query
    heads of a key head stand among the rows: `[B, G, H / G size, K]`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, k, v, sums, window, scale = args
        ctx.window, ctx.scale = window, scale
        ctx.save_for_backward(q, k, v, sums)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        for rows, keys, bias in blocks(q, k, sums, window):
            found = F.scaled_dot_product_attention(
                group(q[:, :, rows], k), k[:, :, keys], v[:, :, keys], attn_mask=bias, scale=scale
            )
            o[:, :, rows] = found.view(*q.shape[:2], -1, v.shape[3])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (do,) = grad_outputs
        q, k, v, sums = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv, dsums = (torch.zeros_like(t) for t in (k, v, sums))
        past = k.shape[2] - q.shape[2]
        for rows, keys, bias in blocks(q, k, sums, ctx.window):
            q_, do_ = (group(t[:, :, rows], k) for t in (q, do))
            k_, v_ = k[:, :, keys], v[:, :, keys]
            weights = bias.add_(q_ @ k_.mT, alpha=ctx.scale).softmax(-1)
            dv[:, :, keys] += weights.mT @ do_
            ds = (do_ @ v_.mT).mul_(weights)
            ds.addcmul_(weights, ds.sum(-1, keepdim=True), value=-1)
            dq[:, :, rows] = (ds @ k_).mul_(ctx.scale).view_as(q[:, :, rows])
            dk[:, :, keys] += (ds.mT @ q_).mul_(ctx.scale)
            ds = ds.view(*q.shape[:2], -1, ds.shape[-1])
            # A row of ds is zero in sum but for rounding, which would add up over the rows later
            # than a gate if it were not taken from F_i just as it is from F_j, in float64.
            dsums[:, :, past + rows.start : past + rows.stop] += ds.sum(-1, dtype=sums.dtype)
            dsums[:, :, keys] -= ds.sum(2, dtype=sums.dtype)
        return dq, dk, dv, dsums, None, None


def group(t: Tensor, k: Tensor) -> Tensor:
    """`[B, H, n, K]` -> `[B, G, H / G n, K]`, for the G heads of k."""
    return t.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def blocks(
    q: Tensor, k: Tensor, sums: Tensor, window: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of every block its queries, the keys that they see, and the bias F_i - F_j, in q's dtype, or
    -inf, `[B, G, H / G size, keys]`, in memory that the next block uses again.

    Sums of thousands of gates in float32 would lose the small differences of neighbours. These are
    taken in float64, inside the block, and to keys before it in two parts, to the block's first
    query and on to the key: both have the same sign, so that nothing cancels.
    """
    (B, H, T), total = q.shape[:3], k.shape[2]
    size = min(T, BLOCK)
    room = q.new_empty(B * H * size * min(total, window - 1 + size))
    future = sums.new_full((size, size), -torch.inf).triu(1)
    for start in range(0, T, size):
        i = slice(total - T + start, total - T + min(T, start + size))
        j = slice(max(0, i.start + 1 - window), i.stop)
        rows, before = i.stop - i.start, i.start - j.start
        bias = room[: B * H * rows * (before + rows)].view(B, H, rows, -1)
        near, far = sums[:, :, i], sums[:, :, j.start : i.start]
        first, mask = near[:, :, :1], future[:rows, :rows]
        far = (first - far).to(q.dtype)[:, :, None]
        torch.add((near - first).to(q.dtype)[..., None], far, out=bias[..., :before])
        bias[..., before:] = near[..., None] - near[..., None, :] + mask
        if (edge := before + rows - window) > 0:  # keys that have left the window of some query
            gone = torch.ones(rows, edge, dtype=torch.bool, device=q.device).tril(before - window)
            bias[..., :edge].masked_fill_(gone, -torch.inf)
        yield slice(start, start + rows), j, group(bias, k)
