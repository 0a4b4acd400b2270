"""A learned logit in the divisor of softmax attention, and how PyTorch's attention takes it.

p_tj = e^(scale <q_t, k_j>) / (e^sink + sum_j' e^(scale <q_t, k_j'>)): it is a key in front of all
others that every query sees, of this logit and of value 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.ops import accumulator_dtype

from .heads import attend_causal

PARTS = 3
"""So many channels hold a logit, each with 8 of its bits: bfloat16 has no more."""
LOWEST = -1e30
LOWEST_HALF = -3e4
"""What stands for -inf, which times 0 would be NaN; float16 ends at -65504."""


def sink_parameter(start: float | None, heads: int) -> nn.Parameter | None:
    """A logit for each head, all the same at the start; None is none."""
    return None if start is None else nn.Parameter(torch.full((heads,), float(start)))


def remove_sink(layer: Any) -> None:
    nn.init.constant_(layer.sink_logit, -math.inf)


def with_sink(
    q: Tensor, k: Tensor, v: Tensor, sink_logit: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """q `[B, T, H, K]`, k, v `[B, n, G, K | V]` -> q, k, v and a scale with which plain attention
    has the logit `[H]` in its divisor: k and v with the sink in front, `n + 1` tokens, and all
    with more channels, a multiple of 8, as kernels want them. The output's first V channels count.

    The logit differs from query head to query head, and a key may not: so it is in channels of q
    that only the first key reads.
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
    kind = "cpu" if q.device.type == "meta" else q.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return LOWEST_HALF if torch.float16 in (q.dtype, autocast) else LOWEST


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors whose sum is x, also after each has been rounded to bfloat16, if x is of
    float32. The first one has the gradient."""
    rest = x.detach() - x.detach().bfloat16()
    low = rest.bfloat16().to(x.dtype)
    return x - rest, low, rest - low


def attend_causal_with_sink(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attend_causal` of what `with_sink` made. If all tokens are new, the sink asks, too, so that
    there are as many queries as keys, and PyTorch needs no mask for what is causal."""
    T, n = q.shape[1], k.shape[1]
    if 1 < n == T + 1:
        q = F.pad(q, (0, 0, 0, 0, 1, 0))
    return attend_causal(q, k, v, scale)[:, q.shape[1] - T :]
