"""Linear attention, S_t = D_t S_{t-1} + k_t^T v_t, with any decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import launch
from . import ops

LIMIT = 256
"""Channels of q and k, and of v: a program holds a slice of the state of all key channels."""
TRUSTED = 128
"""Those with which a gradient has been right on every GPU that it was taken on."""


def run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    dtype, (K, V) = q.dtype, state.shape[2:]
    if not q.shape[1]:
        return torch.zeros_like(v, dtype=dtype), state.clone()
    if dtype == torch.float16:  # it would have to hold the states' values
        q = q.float()
    k, v, state = k.to(q.dtype), v.to(q.dtype), state.float()
    g = None if log_decay is None else log_decay.float()
    given = (q, k, v, state) if g is None else (q, k, v, g, state)
    if q.shape[1] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        o, state = ops.decode_step(q, k, v, g, state, float(scale))
        return o.to(dtype), state
    rows, columns = (launch.power_of_two(n) for n in (K, V))
    q, k, v = (launch.pad_channels(x, n) for x, n in ((q, rows), (k, rows), (v, columns)))
    if g is not None and g.ndim == 4:
        g = launch.pad_channels(g, rows)
    if (rows, columns) != (K, V):
        state = F.pad(state, (0, columns - V, 0, rows - K))
    o, state = ops.forward(q, k, v, g, state, float(scale))
    return o[..., :V].to(dtype), state[..., :K, :V]


def supports(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: Any, state: Tensor
) -> str | None:
    reason = launch.refusal(q, k, v, log_decay, state)
    if reason is not None:
        return reason
    for name, n in (("K", k.shape[3]), ("V", v.shape[3])):
        if n > LIMIT:
            return f"{name} = {n} is more than the {LIMIT} channels that it takes"
    if log_decay is not None and log_decay.dim() == 4:
        return launch.distrusted("of a decay per channel", q, k, v, log_decay, state)
    if max(k.shape[3], v.shape[3]) > TRUSTED:
        return launch.distrusted(f"of more than {TRUSTED} channels", q, k, v, log_decay, state)
    return None
