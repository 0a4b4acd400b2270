"""Sliding-window attention with sinks: `layerzoo.attention.sliding.sliding_attention`.

o_i = sum_j softmax_j(scale <q_i, k_j>) v_j over j <= i with i - j < window or j < sinks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import launch
from .backward import backward_kv, backward_q, backward_sinks
from .decode import combine, decode
from .forward import forward
from .settings import settings

LOG2E = math.log2(math.e)
WIDEST = 256
FEW = 16
"""So many queries of the query heads of one key head go to the decode kernel together."""


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    start: int,
    scale: float,
    sink_logit: Tensor | None = None,
) -> str | None:
    if sink_logit is not None:
        return "it takes no sink logit; use 'chunked' or 'auto'"
    reason = launch.refusal(q, k, v)
    if reason:
        return reason
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > WIDEST:
        return f"it takes heads of up to {WIDEST} channels, got K = {K} and V = {V}"
    apart = max(0, min(sinks, start - (window - 1)))
    if apart < sinks and start != k.shape[1] - q.shape[1]:
        return "the cache lacks sinks, or tokens between them and the window"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    start: int,
    scale: float,
    sink_logit: None = None,
) -> Tensor:
    """q [B, T, H, K]; k, v [B, n, G, K | V], the cache and then the T new tokens."""
    k, v = (t if t.dtype == q.dtype else t.to(q.dtype) for t in (k, v))
    if q.shape[1] == 0 or q.numel() == 0 or v.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if scale <= 0:  # the kernels take the maximum before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    n = k.shape[1]
    options = (min(window, n), min(sinks, n), float(scale))
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if grad or torch.compiler.is_compiling():
        return attention(q, k, v, *options)[0]
    return attend(q, k, v, *options)[0]


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, token and head of each."""
    return tuple(stride for t in tensors for stride in t.stride()[:3])


def rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With adjacent channels, and otherwise as they are: a cache is not copied."""
    return tuple(t if t.stride(3) == 1 else t.contiguous() for t in tensors)


def sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    K, V = q.shape[3], v.shape[3]
    return {
        "K": K,
        "V": V,
        "BK": launch.power_of_two(K),
        "BV": launch.power_of_two(V),
        "precision": launch.precision(q.dtype),
    }


def attend(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V], and of each query the maximum and the sum, [2, B, H, T]: see forward.py."""
    q, k, v = rows(q, k, v)
    (B, T, H, _), (_, n, G, V) = q.shape, v.shape
    R, size = H // G, sizes(q, v)
    machine = launch.target(q.device)
    o = launch.empty((B, T, H, V), like=q)
    stats = launch.empty((2, B, H, T), like=q, dtype=torch.float32)
    if T * R > FEW:
        s = settings("forward", max(size["BK"], size["BV"]), q.dtype, machine)
        launch.launch(
            forward, (H, -(-T // s.BM), B), q, k, v, o, stats, *strides(q, k, v),
            T, n, window, sinks, scale * LOG2E, H, R, B, **s.options(), **size,
        )  # fmt: skip
        return o, stats
    s = settings("decode", max(size["BK"], size["BV"]), q.dtype, machine)
    blocks = -(-min(n, window + T - 1 + sinks) // s.BN)
    splits = max(1, min(blocks, 2 * machine.multiprocessors // (B * G)))
    part, part_stats = o, stats
    if splits > 1:
        part = launch.empty((splits, B, T, H, V), like=q, dtype=torch.float32)
        part_stats = launch.empty((2, splits, B, H, T), like=q, dtype=torch.float32)
    launch.launch(
        decode, (G, splits, B), q, k, v, part, part_stats, *strides(q, k, v),
        T, n, window, sinks, splits, scale * LOG2E, H, R, B, **s.options(), **size,
    )  # fmt: skip
    if splits > 1:
        launch.launch(
            combine, (H, T, B), part, part_stats, o, stats, T, splits, H, B,
            V=V, BV=size["BV"], S=launch.power_of_two(splits, 1), num_warps=4,
        )  # fmt: skip
    return o, stats


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    stats: Tensor,
    do: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv"""
    q, k, v, do = rows(q, k, v, do)
    (B, T, H, K), (_, n, G, V) = q.shape, v.shape
    R, size = H // G, sizes(q, v)
    machine = launch.target(q.device)
    wide = max(size["BK"], size["BV"])
    dq, dk, dv = (launch.empty(t.shape, like=t) for t in (q, k, v))
    lines = launch.empty((2, B, H, T), like=q, dtype=torch.float32)
    c, steps = scale * LOG2E, strides(q, k, v, do)
    s = settings("backward_q", wide, q.dtype, machine)
    launch.launch(
        backward_q, (H, -(-T // s.BM), B), q, k, v, o, do, stats, lines, dq, *steps,
        T, n, window, sinks, c, scale, H, R, B, **s.options(), **size,
    )  # fmt: skip
    s = settings("backward_kv", wide, q.dtype, machine)
    launch.launch(
        backward_kv, (G, -(-(n - sinks) // s.BN), B), q, k, v, do, stats, lines, dk, dv, *steps,
        T, n, window, sinks, c, scale, H, R, B, **s.options(), **size,
    )  # fmt: skip
    if sinks:
        s = settings("backward_sinks", wide, q.dtype, machine)
        blocks = -(-sinks // s.BN)
        parts = min(-(-T // s.BM), -(-4 * machine.multiprocessors // (B * G * blocks)))
        part = -(-T // parts)
        parts = -(-T // part)
        sums = tuple(
            launch.empty((parts, B, sinks, G, D), like=q, dtype=torch.float32) for D in (K, V)
        )
        launch.launch(
            backward_sinks, (G * blocks, parts, B), q, k, v, do, stats, lines, *sums, *steps,
            T, n, sinks, part, c, scale, H, R, B, **s.options(), **size,
        )  # fmt: skip
        dk[:, :sinks], dv[:, :sinks] = (x.sum(0) for x in sums)
    return dq, dk, dv


attention: Any = torch.library.custom_op("layerzoo::sliding_attention", attend, mutates_args=())
attention_gradients: Any = torch.library.custom_op(
    "layerzoo::sliding_attention_gradients", gradients, mutates_args=()
)


@attention.register_fake
def _(q, k, v, window, sinks, scale):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(2, B, H, T, dtype=torch.float32)


@attention_gradients.register_fake
def _(q, k, v, o, stats, do, window, sinks, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _backward(ctx: Any, do: Tensor, _: Any) -> Any:
    return *attention_gradients(*ctx.saved_tensors, do, *ctx.options), None, None, None


attention.register_autograd(_backward, setup_context=_setup)
