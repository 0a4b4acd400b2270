"""Triton kernels of `layerzoo.memories.delta.delta_rule`.

S' = D_t S_{t-1},  S_t = S' + beta_t k_t^T (v_t - k_t S'),  o_t = scale q_t S_t
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import launch
from .op import forward, one_step

LARGEST = 256
"""Key channels: the state's slice of a program has to fit its registers."""


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor,
) -> str | None:
    if (reason := launch.refusal(q, k, v, beta, log_decay, state)) is not None:
        return reason
    if q.shape[-1] > LARGEST:
        return f"it takes at most {LARGEST} key channels, not {q.shape[-1]}"
    if log_decay is not None and log_decay.dim() == 4:
        return launch.distrusted("of a decay per channel", q, k, v, beta, log_decay, state)
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    V = v.shape[-1]
    if T == 0:
        return torch.zeros_like(v, dtype=q.dtype), state.float()
    sizes = launch.power_of_two(K), launch.power_of_two(V)
    q, k, v = (
        launch.pad_channels(x.to(q.dtype), size).contiguous()
        for x, size in ((q, sizes[0]), (k, sizes[0]), (v, sizes[1]))
    )
    given = state.float()
    if sizes != (K, V):
        given = torch.nn.functional.pad(given, (0, sizes[1] - V, 0, sizes[0] - K))
    given, beta = given.contiguous(), beta.float().contiguous()
    g = log_decay
    if g is not None:
        g = g.float()
        g = (launch.pad_channels(g, sizes[0]) if g.dim() == 4 else g.expand(B, T, H)).contiguous()
    tensors: Any = (q, k, v, beta, g, given)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if T == 1 and not save:
        o, end = one_step(*tensors, float(scale))
    else:
        o, end, *_ = forward(*tensors, float(scale), save)
    return o[..., :V], end[..., :K, :V]
