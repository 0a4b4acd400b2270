"""Peers of the attention layers, and the yardstick of all memories: PyTorch's own attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.bench.peers import Arm, Tensors, peer
from layerzoo.layer import Layer, State


@peer("sdpa", "ops", layers=("softmax",))
@peer("sdpa", "ops", beside=("memory",))
def sdpa(layer: Layer, tensors: Tensors) -> Arm:
    """Causal F.scaled_dot_product_attention on the same q, k, v; a decode step concatenates."""

    def run(tensors: Tensors, state: State) -> tuple[Tensor, State]:
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        grouped = q.shape[1] != k.shape[1]
        if state is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return o.transpose(1, 2), (k, v)
        k, v = (torch.cat((past, new), 2) for past, new in zip(state, (k, v), strict=True))
        new, total = q.shape[2], k.shape[2]
        mask = None
        if new > 1:
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return o.transpose(1, 2), (k, v)

    return Arm(run, {name: tensors[name] for name in "qkv"}, step=run, carries=True)
