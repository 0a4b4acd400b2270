"""A learned logit in the divisor of softmax attention, and how PyTorch's attention takes it.

p_tj = e^(scale <q_t, k_j>) / (e^sink + sum_j' e^(scale <q_t, k_j'>))

This is plain attention with one more key in front, which every query sees, whose logit is `sink`
and whose value is 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.attend import attend_causal
from layerzoo.ops import accumulator_dtype

PARTS = 3
"""Channels that hold a logit. Each has 8 of its 24 bits, since bfloat16 has no more."""
LOWEST = -1e30
LOWEST_HALF = -3e4
"""These stand for -inf, because -inf times 0 is NaN. The second one fits into float16."""


def sink_parameter(start: float | None, heads: int) -> nn.Parameter | None:
    """A learned logit per head, which starts at `start`; None without a start."""
    return None if start is None else nn.Parameter(torch.full((heads,), float(start)))


def remove_sink(layer: Any) -> None:
    nn.init.constant_(layer.sink_logit, -math.inf)


def with_sink(
    q: Tensor, k: Tensor, v: Tensor, sink_logit: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Change q, k, v and the scale so that plain attention of them has the logit in its divisor.

    k and v get one more token in front, the sink. All three get more channels, up to a multiple of
    8, which kernels want. Each query head has its own logit, but query heads may share a key. So
    the logit stands in additional channels of q, and the sink is the only key that reads them.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, n, G, K]` and `[B, n, G, V]`.
        sink_logit: `[H]`.

    Returns:
        The new q, k `[B, n + 1, ...]`, v `[B, n + 1, ...]` and scale. Only the first V channels of
        the attention's output mean anything.
    """
    if scale <= 0:
        q, scale = q * scale, 1.0
    K, V = q.shape[3], v.shape[3]
    more = PARTS + -(K + PARTS) % 8
    unit = 2.0 ** -math.floor(math.log2(scale))  # of the key; exact in every dtype
    logit = sink_logit.to(accumulator_dtype(q)).clamp(min=lowest(q)) / (scale * unit)
    channels = F.pad(torch.stack(split(logit), -1), (0, more - PARTS))
    first = k.new_zeros(K + more)
    first[K : K + PARTS] = unit
    q = torch.cat((q, channels.expand(*q.shape[:3], -1).to(q.dtype)), 3)
    k = torch.cat((first.expand(k.shape[0], 1, k.shape[2], -1), F.pad(k, (0, more))), 1)
    return q, k, F.pad(v, (0, max(0, K + more - V), 0, 0, 1, 0)), scale


def lowest(q: Tensor) -> float:
    """The logit that stands for -inf in the dtype in which attention will run."""
    kind = "cpu" if q.device.type == "meta" else q.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return LOWEST_HALF if torch.float16 in (q.dtype, autocast) else LOWEST


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a float32 x into three tensors whose sum is x even if each is rounded to bfloat16. The
    first carries the gradient."""
    rest = x.detach() - x.detach().bfloat16()
    low = rest.bfloat16().to(x.dtype)
    return x - rest, low, rest - low


def attend_causal_with_sink(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attend_causal` on the tensors that `with_sink` made.

    If there are no cached tokens, a query is added for the sink. Then there are as many queries as
    keys, and PyTorch's causal attention needs no mask.
    """
    T, n = q.shape[1], k.shape[1]
    if 1 < n == T + 1:
        q = F.pad(q, (0, 0, 0, 0, 1, 0))
    return attend_causal(q, k, v, scale)[:, q.shape[1] - T :]
