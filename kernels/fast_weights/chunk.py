"""Gated networks written a chunk at a time (`update: chunk`), as one operator.

The work is in chunk_forward.py and chunk_backward.py, on matrices of gate and up side by side; a
token that is decoded, and does not fill its mini-batch, goes to chunk_decode.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..launch import refusal
from . import chunk_backward, chunk_forward
from .chunk_decode import WIDEST, decode
from .chunk_parts import Rules, slots

GIVEN = """Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? momentum, Tensor? retention,
    Tensor W02, Tensor W1, Tensor? U02, Tensor? U1, Tensor? S02, Tensor? S1, Tensor? A, Tensor? m,
    Tensor? n02, Tensor? n1, Tensor? position"""
RULES = "int C, str place, bool residual, bool l2, float muon, float eps"
GRADS = ", ".join(f"Tensor? g{n}" for n in range(9))
KEPT = "Tensor M02, Tensor M1, Tensor K02, Tensor K1"


def tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def filled(like: Tensor, *found: Any) -> tuple[Tensor, ...]:
    """Operators return tensors: none is one without elements."""
    return tuple(like.new_empty(0) if x is None else x for x in found)


def some(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


@torch.library.custom_op(
    "layerzoo::fast_weights_chunk",
    mutates_args=(),
    schema=f"({GIVEN}, {RULES}, bool keep) -> {tensors(13)}",
)
def chunk(*args: Any) -> Any:
    """o, W02, W1, U02, U1, S02, S1, A, m and what the backward needs."""
    q, k, v, lr, momentum, retention, *matrices, A, m, n02, n1, past = args[:17]
    W, U, S = matrices[:2], matrices[2:4], matrices[4:6]
    past = 0 if past is None else int(past)
    rules, keep = Rules(*args[17:23]), args[23]
    with torch.autocast(q.device.type, enabled=False):
        o, new, new_U, new_S, new_A, new_m, M, K = chunk_forward.forward(
            q, k, v, lr, momentum, retention, W, U, S, A, m, [n02, n1], past, rules, keep
        )
    if U[0] is not None and new_U[0] is None:
        new_U = [torch.zeros_like(u) for u in U]
    new_A = torch.ones_like(A) if A is not None and new_A is None else new_A
    new_m = torch.zeros_like(m) if m is not None and new_m is None else new_m
    pending = [None if x is None else y for x, y in ((U[0], new_U[0]), (U[1], new_U[1]))]
    gates = [None if x is None else y for x, y in ((A, new_A), (m, new_m))]
    kept = (*M, *K) if keep else (None,) * 4
    return filled(lr, o, *new, *pending, *new_S, *gates, *kept)


@chunk.register_fake
def _(*args: Any) -> Any:
    q, _, v, lr, _, _, *state, _, _, _ = args[:17]
    keep, count = args[23], slots(q.shape[1], args[17])
    like = (None if x is None else torch.empty_like(x) for x in state)
    wide = (state[n] if keep else None for n in (0, 1, 4, 5))
    kept = (None if x is None else x.new_empty(count, *x.shape) for x in wide)
    return filled(lr, v.new_empty(v.shape), *like, *kept)


@torch.library.custom_op(
    "layerzoo::fast_weights_chunk_backward",
    mutates_args=(),
    schema=f"({GRADS}, {GIVEN}, {KEPT}, {RULES}) -> {tensors(16)}",
)
def chunk_backward_op(*args: Any) -> Any:
    """Gradients of all that `chunk` is given, up to n1."""
    grads, given, kept = args[:9], args[9:26], args[26:30]
    q, k, v, lr, momentum, retention, *matrices, A, m, n02, n1, past = given
    W, U, S = matrices[:2], matrices[2:4], matrices[4:6]
    past = 0 if past is None else int(past)
    like = (v, *W, *U, *S, A, m)
    # What nothing asks for has gradient zero.
    g_o: Any
    g_o, *g = (
        None if x is None else torch.zeros_like(x) if y is None else y.contiguous()
        for x, y in zip(like, grads, strict=True)
    )
    M, K = list(kept[:2]), [some(x) for x in kept[2:]]
    with torch.autocast(q.device.type, enabled=False):
        *tokens, d_W, d_U, d_S, d_A, d_m, d_n = chunk_backward.backward(
            g_o, g[:2], g[2:4], g[4:6], g[6], g[7], q, k, v, lr, momentum, retention, U, A, m,
            [n02, n1], M, K, past, Rules(*args[30:]),
        )  # fmt: skip
    d_U = [None if x is None else torch.zeros_like(x) if y is None else y
           for x, y in zip(U, d_U, strict=True)]  # fmt: skip
    d_A = torch.zeros_like(A) if A is not None and d_A is None else d_A
    d_m = torch.zeros_like(m) if m is not None and d_m is None else d_m
    return filled(lr, *tokens, *d_W, *d_U, *d_S, d_A, d_m, *d_n)


@chunk_backward_op.register_fake
def _(*args: Any) -> Any:
    given = args[9:25]
    found = (None if x is None else x.new_empty(x.shape) for x in given)
    return filled(given[3], *found)


def setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:17], *output[9:])
    ctx.rules = inputs[17:23]
    ctx.set_materialize_grads(False)


def backward(ctx: Any, *grads: Any) -> Any:
    found = torch.ops.layerzoo.fast_weights_chunk_backward(
        *grads[:9], *ctx.saved_tensors, *ctx.rules
    )
    given = ctx.saved_tensors[:16]
    return *(None if x is None else y for x, y in zip(given, found, strict=True)), *(None,) * 8


chunk.register_autograd(backward, setup_context=setup)


def supports_chunk(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, decay: Any, row: Any,
    layer_norm: Any, initial: tuple[Tensor, ...], *, rule: Any, state: Any, checkpoint: bool,
    compiled: bool, watch: Any,
) -> str | None:  # fmt: skip
    """Why a rule with `update: chunk` cannot run here."""
    network = rule.network
    if network.name != "glu":
        return f"with update 'chunk' it has network 'glu' alone, not '{network.name}'"
    if network.bias or network.layer_norm:
        return "with update 'chunk' it has neither bias nor layer_norm"
    if rule.objective.name not in ("l2", "dot"):
        return f"with update 'chunk' it has objectives l2 and dot, not '{rule.objective.name}'"
    if rule.optimiser.name not in ("sgd", "momentum", "muon"):
        return f"it has no optimiser '{rule.optimiser.name}'"
    if rule.forgetting.nonlinear and rule.forgetting.name != "norm":
        return f"with update 'chunk' it has no forgetting '{rule.forgetting.name}'"
    if watch is not None:
        return "it calls no watch"
    pending = (*state["weights"], *state.get("updates", ()), *state.get("momentum", ()))
    return refusal(q, k, v, lr, momentum, decay, *initial, *pending)


def beside(x: Any) -> list[Any]:
    """W0 and W2 in one matrix, and W1; None of None."""
    return [None, None] if x is None else [torch.cat((x[0], x[2]), -1), x[1]]


def run_chunk(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, decay: Any, row: Any,
    layer_norm: Any, initial: tuple[Tensor, ...], *, rule: Any, state: Any, checkpoint: bool,
    compiled: bool, watch: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """As `memories.fast_weights.engine.run`; nothing is kept but weights, so `checkpoint` has
    nothing to add."""
    B, T, H, K = q.shape
    if T == 0:
        return torch.zeros_like(v, dtype=q.dtype), state
    k, v, lr = k.to(q.dtype), v.to(q.dtype), lr.float()
    momentum = None if momentum is None else momentum.float()
    retention = None if decay is None else 1 - decay.float()
    parts = {name: x for name, x in state.items() if name != "position"}
    flat: Any = tree_map(lambda x: x.float().flatten(0, 1), parts)
    norms = [None] * 3
    if rule.forgetting.name == "norm":
        norms = [w.float().norm(dim=-2) for w in initial]
    eps = getattr(rule.forgetting, "eps", 0.0)
    flags = (rule.network.residual, rule.objective.name == "l2")
    leaves = (q, k, v, lr, momentum, retention, *norms, flat)
    grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in tree_leaves(leaves) if x is not None
    )
    if T == 1 and not grad and "updates" in flat and max(K, v.shape[-1]) <= WIDEST:
        past = int(state["position"])
        if (past + 1) % rule.mini_batch:
            fresh, mapped = past % rule.mini_batch == 0, norms[0] is not None
            if rule.place == "end" or past < rule.mini_batch:
                mapped = False
            return decode(
                q, k, v, lr, momentum, retention, flat, norms if mapped else [None] * 3, state,
                fresh, rule.place, eps, *flags,
            )  # fmt: skip
    W, U, S = (beside(flat.get(name)) for name in ("weights", "updates", "momentum"))
    n = beside(None if norms[0] is None else norms)
    optimiser = rule.optimiser
    o, *found = torch.ops.layerzoo.fast_weights_chunk(
        q, k, v, lr, momentum, retention, *W, *U, *S, flat.get("retention"),
        flat.get("momentum_sum"), *n, state.get("position"), rule.mini_batch, rule.place, *flags,
        optimiser.eps if optimiser.name == "muon" else 0.0, eps, grad,
    )  # fmt: skip

    def apart(x: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        gate, up = (y.contiguous() for y in x.chunk(2, -1))
        return tuple(y.unflatten(0, (B, H)) for y in (gate, down, up))

    new = {
        "weights": lambda: apart(*found[:2]),
        "updates": lambda: apart(*found[2:4]),
        "momentum": lambda: apart(*found[4:6]),
        "retention": lambda: found[6].reshape(B, H),
        "momentum_sum": lambda: found[7].reshape(B, H),
        "position": lambda: state["position"] + T,
    }
    return o, {name: new[name]() for name in state}
