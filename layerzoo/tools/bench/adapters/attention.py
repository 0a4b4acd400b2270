"""Peers of the attention layers, and the yardstick of all memories: PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.layer import Layer, State
from layerzoo.tools.bench.peers import Contender, Tensors, Unfit, load, peer


def refuse_sink_logit(layer: Layer) -> None:
    if getattr(layer.config, "sink_logit", None) is not None:
        raise Unfit("it has no sink logit")


@peer("sdpa", "ops", layers=("softmax",))
@peer("sdpa", "ops", beside=("memory",))
def sdpa(layer: Layer, tensors: Tensors) -> Contender:
    """Causal F.scaled_dot_product_attention on the same q, k, v; a decode step concatenates."""
    refuse_sink_logit(layer)

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

    return Contender(run, {name: tensors[name] for name in "qkv"}, step=run, carries=True)


@peer(
    "local-attention",
    "ops",
    layers=("sliding",),
    module="local_attention",
    library="local-attention",
)
def local_attention(layer: Any, tensors: Tensors) -> Contender:
    """LocalAttention without positions of its own. Its exact window is the tokens before the
    current one, so that ours of w is its w - 1; it has no sinks, grouped heads or cache."""
    refuse_sink_logit(layer)
    (LocalAttention,) = load("local_attention", "LocalAttention")
    c = layer.config
    if c.sinks or c.window < 2 or tensors["q"].shape != tensors["k"].shape:
        raise Unfit("it has no sinks, no window of 1 and no grouped heads")
    attention = LocalAttention(
        window_size=c.window - 1,
        causal=True,
        look_backward=1,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )

    def run(tensors: Tensors, state: State) -> tuple[Tensor, State]:
        o = attention(*(tensors[name].transpose(1, 2) for name in "qkv"))
        return o.transpose(1, 2), None

    return Contender(run, {name: tensors[name] for name in "qkv"})


@peer("sdpa", "ops", beside=("attention",), device="cuda")
def sdpa_beside(layer: Layer, tensors: Tensors) -> Contender:
    """The yardstick of the other attention layers on a GPU."""
    if tensors.keys() < {"q", "k", "v"}:
        raise Unfit("it needs q, k and v")
    return sdpa(layer, tensors)


@peer("flex_attention", "ops", layers=("sliding",), device="cuda")
def flex(layer: Any, tensors: Tensors) -> Contender:
    """PyTorch's compiled flex_attention, with the window and the sinks as its mask."""
    refuse_sink_logit(layer)
    flex_attention, create_block_mask = load(
        "torch.nn.attention.flex_attention", "flex_attention", "create_block_mask"
    )
    c, (q, k) = layer.config, (tensors["q"], tensors["k"])

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((i - j < c.window) | (j < c.sinks))

    mask = create_block_mask(seen, None, None, q.shape[1], k.shape[1], device=str(q.device))
    fast = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[2] != k.shape[2]

    def run(tensors: Tensors, state: State) -> tuple[Tensor, State]:
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        return fast(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2), None

    return Contender(run, {name: tensors[name] for name in "qkv"})
