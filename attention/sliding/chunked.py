"""The fast form of sliding-window attention in PyTorch: blocks of queries, and what they see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.attend import attend_causal, dot_product_attention
from layerzoo.ops import transforming

from ..sink_logit import attend_causal_with_sink, with_sink

if TYPE_CHECKING:
    pass


Pair = tuple[Tensor, Tensor]


BLOCK = 128
"""Queries of a block. More would compute more masked logits, fewer would copy more keys."""


def run(q, k, v, *, window, sinks, start, scale, sink_logit=None):
    """See `sliding_attention`.

    Queries before the sinks have left the window see all tokens, so that is plain causal
    attention. The other queries go in equal blocks, and the rest in a shorter block. A sink logit
    becomes one more sink in front of all tokens.
    """
    T, reach, wide = q.shape[1], window - 1, v.shape[3]
    k, v = k.to(q.dtype), v.to(q.dtype)
    whole = attend_causal
    if sink_logit is not None:
        q, k, v, scale = with_sink(q, k, v, sink_logit, scale)
        whole, sinks, start = attend_causal_with_sink, sinks + 1, start + 1
    head = min(T, max(0, reach + sinks - start))
    outputs = []
    if head or T == 0:
        end = k.shape[1] - (T - head)
        outputs.append(whole(q[:, :head], k[:, :end], v[:, :end], scale))
    size = max(16, min(window, BLOCK))
    left = (T - head) % size
    for first, last in ((head, T - left), (T - left, T)):
        if first < last:
            end = k.shape[1] - (T - last)
            keys = slice(end - (last - first) - reach, end)
            always, recent = ((t[:, :sinks] for t in (k, v)), (t[:, keys] for t in (k, v)))
            ks, vs = zip(always, recent, strict=True)
            outputs.append(band(q[:, first:last], ks, vs, min(size, last - first), scale))
    o = torch.cat(outputs, 1) if outputs[1:] else outputs[0]
    return o if sink_logit is None else o[..., :wide]


def band(q: Tensor, k: Pair, v: Pair, size: int, scale: float) -> Tensor:
    """Attention of each query to the sinks and to the window that ends with it, in blocks.

    The N blocks are folded into the batch, because all have the same mask. Their keys overlap.
    They are a view if there are no sinks and one sequence in the batch, otherwise a copy.

    Args:
        q: `[B, N size, H, K]`.
        k, v: pairs of the sinks and of the N size + window - 1 recent tokens.
        size: queries of a block.
    """
    sinks, reach = k[0].shape[1], k[1].shape[1] - q.shape[1]
    blocks = q.shape[1] // size
    step = size if blocks > 1 else size + reach
    keys, values = (overlapping(t[1], step, size + reach) for t in (k, v))
    if sinks:
        keys, values = (
            torch.cat((t[0].transpose(1, 2)[:, None].expand(-1, blocks, -1, -1, -1), f), 3)
            for t, f in ((k, keys), (v, values))
        )
    mask = None
    if size > 1:
        mask = torch.ones(size, size + reach, dtype=torch.bool, device=q.device)
        mask = F.pad(mask.tril(reach).triu(), (sinks, 0), value=True)
    o = dot_product_attention(
        q.unflatten(1, (blocks, size)).transpose(2, 3).flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k[1].shape[2],
    )
    return o.unflatten(0, (-1, blocks)).transpose(2, 3).flatten(1, 2)


def overlapping(t: Tensor, step: int, width: int) -> Tensor:
    """`[B, n, H, K]` -> `[B, N, H, width, K]`, where block b begins at token b * step."""
    if not transforming():
        return Overlapping.apply(t, step, width)
    first = torch.arange(0, t.shape[1] - width + 1, step, device=t.device)
    return t[:, first[:, None] + torch.arange(width, device=t.device)].transpose(2, 3)


class Overlapping(torch.autograd.Function):
    """A view whose backward pass adds up whole blocks, where `unfold` adds up single tokens."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        t, ctx.step, width = args
        ctx.tokens = t.shape[1]
        return t.unfold(1, width, ctx.step).permute(0, 1, 2, 4, 3)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        pieces = grad_outputs[0].transpose(2, 3).split(ctx.step, 2)
        B, N, _, H, K = pieces[0].shape
        total = pieces[0].new_zeros(B, N + len(pieces) - 1, ctx.step, H, K)
        for n, piece in enumerate(pieces):
            total[:, n : n + N, : piece.shape[2]] += piece
        return total.flatten(1, 2)[:, : ctx.tokens], None, None
