"""The specification of all fast weights: a loop over tokens that forms every token's weights and
takes gradients of the scalar loss by autograd. It shares only the options with the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerzoo.ops import transforming

from .rule import Rule
from .state import WeightsState, position


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    row: Tensor | None,
    layer_norm: tuple[Tensor, Tensor] | None,
    initial: tuple[Tensor, ...],
    *,
    rule: Rule,
    state: WeightsState,
    checkpoint: bool,
    compiled: bool,
    watch: Any,
) -> tuple[Tensor, WeightsState]:
    """See `fast_weights`. initial: weights `[N, I, O]`; layer_norm: `[N, 1, V]` each."""
    args: Any = (q, k, v, lr, momentum, decay, row, layer_norm, initial, state)
    recording = torch.is_grad_enabled()  # the next mode turns it on
    # Autograd cannot leave inference mode, in which Lightning tests.
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        if q.is_inference() or any(w.is_inference() for w in initial):
            args = clones(args)
        return tokens(rule, *args)


def clones(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: clones(y) for name, y in x.items()}
    if isinstance(x, tuple):
        return tuple(map(clones, x))
    return x.clone() if isinstance(x, Tensor) else x


def tokens(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    row: Tensor | None,
    layer_norm: tuple[Tensor, Tensor] | None,
    initial: tuple[Tensor, ...],
    state: WeightsState,
) -> tuple[Tensor, WeightsState]:
    B, T, H, _ = q.shape
    C, network, count = rule.mini_batch, rule.network, len(initial)
    matrices, rows = range(count), (B, H)
    lr = lr.expand(B, T, H, count) if lr.shape[-1] == 1 else lr

    def token(x: Tensor, t: int) -> Tensor:
        """Token t: gates `[N, 1, 1]`, vectors `[N, 1, D]`."""
        return x[:, t].reshape(B * H, 1, -1)

    def model(weights: Any, x: Tensor) -> Tensor:
        def times(m: int, z: Tensor) -> Tensor:
            W = weights[m]
            return z @ W[:, :-1] + W[:, -1:] if network.bias else z @ W

        return network.forward(times, x, layer_norm)[0]

    def phi(weights: Any) -> Any:
        if not rule.forgetting.nonlinear:
            return weights
        return [rule.forgetting.phi(weights[m], initial[m]) for m in matrices]

    past = position(state)
    pos = past % C

    def part(name: str, empty: float) -> Tensor:
        """A gate of the mini-batch so far: `empty` at its start, whatever the state holds."""
        given = state.get(name) if pos else None
        fresh = initial[0].new_full((B * H, 1, 1), empty)
        return fresh if given is None else given.reshape(B * H, 1, 1)

    W = [w.flatten(0, 1) for w in state["weights"]]
    U = S = [torch.zeros_like(w) for w in W]
    if "momentum" in state:
        S = [s.flatten(0, 1) for s in state["momentum"]]
    if pos:
        U = [u.flatten(0, 1) for u in state["updates"]]
    A, total = part("retention", 1.0), part("momentum_sum", 0.0)
    outputs = []
    for t in range(T):
        keep = 1.0 if decay is None else 1 - token(decay, t)
        theta = 0.0 if momentum is None else token(momentum, t)
        first = past + t < C  # a norm has nothing to mend before the first write
        maps = rule.place == "view" if rule.forgetting.dual else rule.place != "end" and not first
        anchor = phi(W) if maps else W
        key, value = token(k, t), token(v, t)
        g = gradient(lambda w: rule.objective.loss(model(w, key), value), anchor)  # noqa: B023
        A = A * keep
        if rule.update == "token":
            S = [theta * S[m] - token(lr[..., m], t) * g[m] for m in matrices]
            U = [keep * U[m] + S[m] for m in matrices]
            factor = 1.0 if row is None else row[pos]
            now = [A * W[m] + factor * U[m] for m in matrices]
            outputs.append(model(now, token(q, t)))
        else:
            U = [U[m] - token(lr[..., m], t) * g[m] for m in matrices]
            total = total + theta
            now = W
            outputs.append(model(anchor if rule.place == "view" else W, token(q, t)))
        pos += 1
        if pos < C:
            continue
        if rule.update == "chunk":  # the write
            S = [total / C * S[m] + U[m] for m in matrices]
            base = W if rule.place == "view" else anchor
            now = [A * base[m] + rule.optimiser.direction(S[m]) for m in matrices]
        W = phi(now) if rule.place == "end" else now
        U = [torch.zeros_like(w) for w in W]
        A, total, pos = torch.ones_like(A), torch.zeros_like(total), 0

    def whole(weights: Any) -> tuple[Tensor, ...]:
        return tuple(w.unflatten(0, rows) for w in weights)

    new: WeightsState = {
        "weights": whole(W),
        "updates": whole(U),
        "momentum": whole(S),
        "retention": A.expand(B * H, 1, 1).reshape(rows),
        "momentum_sum": (total + torch.zeros_like(A)).expand(B * H, 1, 1).reshape(rows),
        "position": torch.tensor(past + T),
    }
    o = torch.cat(outputs, 1) if outputs else v.transpose(1, 2).flatten(0, 1)
    return o.unflatten(0, rows).transpose(1, 2), {name: new[name] for name in state}


def gradient(loss: Any, weights: Any) -> tuple[Tensor, ...]:
    """dL/dW of rows that do not share weights, differentiable where the caller's gradients are."""
    if transforming():  # where no leaf may be made
        return torch.func.grad(lambda weights: loss(weights).sum())(tuple(weights))
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
        return torch.autograd.grad(loss(leaves).sum(), leaves, create_graph=create)
