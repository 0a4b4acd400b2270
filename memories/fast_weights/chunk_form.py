"""The chunk form of fast weights, written to be read: it forms the weights of every token.

`engine.py` computes the same without forming them, by the dual form of TTT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rule import Rule

if TYPE_CHECKING:
    from jaxtyping import Float


def chunk_form(
    q, k, v, weights, *, spec, lr, momentum=None, decay=None, row=None, layer_norm=None
):
    """`fast_weights` a mini-batch at a time, to be read beside TTT's section 2.4.

    All gradients g_j of a mini-batch are taken at the weights W_0 from before it. So those of all
    its tokens are known at once, and what is left is linear. With `update: token`, where m(j, i)
    and d(j, i) are the products of the momenta and of 1 - decay from after token j until token i,

    S_i = m(0, i) S_0 - sum_{j <= i} m(j, i) lr_j g_j
    U_i = sum_{j <= i} d(j, i) S_j
    W_i = d(0, i) W_0 + row_i U_i,   o_i = M_(W_i)(q_i)

    and with `update: chunk` every token reads W_0, and after the last of C tokens

    S = mean(momentum) S_0 - sum_j lr_j g_j,   W = d(0, C) W_0 + direction(S)

    T is a multiple of the mini-batch here, and the sequence begins with `weights`.

    Returns:
        The read-outs `[B, T, H, V]`, and the weights after the last mini-batch, `[B, H, I, O]`.
    """
    B, T, H, _ = q.shape
    network, count = spec.network, len(weights)
    start = [w.expand(B, *w.shape[-3:]).flatten(0, 1) for w in weights]
    norm = layer_norm and tuple(x.repeat(B, 1)[:, None, None] for x in layer_norm)
    lr = lr.unsqueeze(-1) if lr.dim() == 3 else lr
    gates = [q.new_zeros(B, T, H) if gate is None else gate for gate in (momentum, decay)]
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, lr, *gates)]
    rows = q.new_ones(spec.mini_batch) if row is None else row
    W, S, outputs = start, [torch.zeros_like(w) for w in start], []

    def mapped(matrices: Sequence[Tensor]) -> list[Tensor]:
        """The forgetting map of a rule that has one."""
        pairs = zip(matrices, start, strict=True)
        return [spec.forgetting.phi(w, first) for w, first in pairs]

    for n, batch in enumerate(zip(*(x.split(spec.mini_batch, 1) for x in tokens), strict=True)):
        queries, keys, values, rates, momenta, decays = batch
        shared = [w.unsqueeze(1) for w in W]
        acts = spec.place != "end" and not (n == 0 and spec.spares_initial)
        anchor = mapped(W) if acts else W
        gradients = token_gradients(spec, anchor, keys, values, norm)
        steps = [-rates[..., m % rates.shape[-1], None, None] * gradients[m] for m in range(count)]
        keep = 1 - decays
        if spec.update == "token":
            momentum_from_start = momenta.cumprod(1)[..., None, None]
            S_all = [
                momentum_from_start * S[m].unsqueeze(1) + weighted_sum(between(momenta), steps[m])
                for m in range(count)
            ]
            U_all = [weighted_sum(between(keep), s) for s in S_all]
            keep_from_start = keep.cumprod(1)[..., None, None]
            pairs = zip(shared, U_all, strict=True)
            W_all = [keep_from_start * w + rows[:, None, None] * u for w, u in pairs]
            outputs.append(read(network, W_all, queries, norm))
            W, S = [w[:, -1] for w in W_all], [s[:, -1] for s in S_all]
        else:
            readers = [w.unsqueeze(1) for w in anchor] if spec.place == "view" else shared
            outputs.append(read(network, readers, queries, norm))
            mean = momenta.mean(1)[:, None, None]
            S = [mean * s + step.sum(1) for s, step in zip(S, steps, strict=True)]
            base = W if spec.place == "view" else anchor
            keep_all = keep.prod(1)[:, None, None]
            pairs = zip(base, S, strict=True)
            W = [keep_all * w + spec.optimiser.direction(s) for w, s in pairs]
        if spec.place == "end":
            W = mapped(W)
    o = torch.cat(outputs, 1).unflatten(0, (B, H)).transpose(1, 2)
    return o, tuple(w.unflatten(0, (B, H)) for w in W)


def read(
    network: Any, weights: Sequence[Float[Tensor, "N n I O"]], x: Float[Tensor, "N n K"], norm: Any
) -> Float[Tensor, "N n V"]:
    """M(x) of every token, with weights of its own or (n = 1) the same for all."""

    def times(m: int, z: Tensor) -> Tensor:
        matrix = weights[m]
        return z @ matrix[..., :-1, :] + matrix[..., -1:, :] if network.bias else z @ matrix

    return network.forward(times, x.unsqueeze(2), norm)[0].squeeze(2)


def token_gradients(
    rule: Rule, anchor: Sequence[Tensor], keys: Tensor, values: Tensor, norm: Any
) -> Sequence[Float[Tensor, "N n I O"]]:
    """The gradient of each token's objective at the weights that all tokens share."""
    n = keys.shape[1]
    own = [w.unsqueeze(1).expand(-1, n, -1, -1).clone() for w in anchor]
    own = [w if w.requires_grad else w.requires_grad_() for w in own]
    loss = rule.objective.loss(read(rule.network, own, keys, norm), values)
    return torch.autograd.grad(loss.sum(), own, create_graph=True)


def between(x: Float[Tensor, "N n"]) -> Float[Tensor, "N n n"]:
    """The product of x from after token j until token i, at [i, j]; 0 where j comes after i."""
    n = x.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(later, x.unsqueeze(-1), 1.0).cumprod(-2).tril()


def weighted_sum(
    factors: Float[Tensor, "N n n"], matrices: Float[Tensor, "N n I O"]
) -> Float[Tensor, "N n I O"]:
    return torch.einsum("nij,njab->niab", factors, matrices)
