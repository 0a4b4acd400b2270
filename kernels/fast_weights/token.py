"""`update: token`: from the op's tensors to what the kernels take, and back.

A call is cut where mini-batches begin and end: what is left of one that a state has begun, whole
ones, and the beginning of the last. Each is one operator (operators.py). All gates enter as
coefficients, so that autograd differentiates what makes them of momentum, decay and row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import launch
from .decode import step
from .operators import TileForm, operator

LONGEST, WIDEST, HIDDEN = 128, 128, 1024
"""Tokens of a mini-batch, channels of k and v, and hidden ones, at most."""


def supports_token(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, rule: Any, watch: Any = None, **_: Any
) -> str | None:
    """Why these kernels cannot, or None."""
    if reason := launch.refusal(q, k, v, rest[0]):
        return reason
    network = rule.network
    if network.name not in ("linear", "mlp") or getattr(network, "depth", 2) != 2:
        return f"its networks are 'linear' and 'mlp' of depth 2, not {network}"
    for axis, known in {
        "objective": ("l2", "dot"),
        "optimiser": ("sgd", "momentum"),
        "forgetting": ("none", "decay"),
    }.items():
        name = getattr(rule, axis).name
        if name not in known:
            return f"its {axis} is '{known[0]}' or '{known[1]}', not '{name}'"
    if rule.mini_batch > LONGEST:
        return f"mini_batch is at most {LONGEST}, got {rule.mini_batch}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"q, k and v have at most {WIDEST} channels a head"
    if network.name == "mlp" and network.shapes(q.shape[-1], v.shape[-1])[0][1] > HIDDEN:
        return f"the hidden width is at most {HIDDEN}"
    return None if watch is None else "nothing can watch inside it"


@torch.compiler.disable(reason="the number of its operators depends on the state's position")
def run_token(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, decay: Any, row: Any,
    layer_norm: Any, initial: Any, *, rule: Any, state: dict[str, Any], **_: Any,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """See `memories.fast_weights.engine.run`."""
    with torch.autocast(q.device.type, enabled=False):
        return _run(q, k, v, lr, momentum, decay, row, layer_norm, rule, state)


def _run(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, decay: Any, row: Any,
    layer_norm: Any, rule: Any, state: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    B, T, H, _ = q.shape
    if T == 0:
        return torch.zeros_like(v, dtype=q.dtype), state
    given: Any = (q, k, v, lr, momentum, decay, row, *(layer_norm or ()), *state["weights"])
    given += *state.get("updates", ()), *state.get("momentum", ()), state.get("retention")
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if T == 1 and not grad:
        return step(
            q, k.to(q.dtype), v.to(q.dtype), lr, momentum, decay, row, layer_norm, rule, state
        )
    form = make_form(q, v, lr, rule, state["weights"])
    k, v = k.to(q.dtype), v.to(q.dtype)
    padded: Any = (
        launch.pad_channels(x, n).contiguous()
        for x, n in ((q, form.keys), (k, form.keys), (v, form.values))
    )
    q, k, v = padded
    wide: Any = (None if x is None else x.float() for x in (lr, momentum, decay, row))
    lr, momentum, decay, row = wide
    norm: Any = (None, None)
    if layer_norm is not None:
        norm = tuple(launch.pad_channels(x.float().flatten(1), form.values) for x in layer_norm)
    W: Any
    U: Any
    W, U = pack(state["weights"], form), None
    S: Any = pack(state["momentum"], form) if "momentum" in state else None
    past, C = int(state["position"]) if "position" in state else 0, rule.mini_batch
    A: Any = None
    if past % C:
        U = pack(state["updates"], form)
        A = state["retention"].flatten() if "retention" in state else None
    outputs = []
    for start, first, size, n in pieces(T, past % C, C):
        end = start + size
        full = (first + n) % C == 0
        part = None if row is None else row[first : first + n]
        cut = (slice(None), slice(start, end))
        gates = [None if x is None else x[cut] for x in (lr, momentum, decay)]
        made: Any = make_coefficients(rule, gates, part, A, n, full, form)
        coefficients, A_end = made
        whole = size == T
        seq: Any = (q, k, v) if whole else (x[cut].contiguous() for x in (q, k, v))
        given = (*seq, *coefficients, *norm, W, U, S)
        o, new, S = operator(given, form._replace(tokens=n, full=full))
        outputs.append(o)
        W, U, A = (new, None, None) if full else (W, new, A_end)
    o = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    like = state["weights"]
    new_state = {
        "weights": lambda: unpack(W, like, form),
        "updates": lambda: (
            tuple(map(torch.zeros_like, like)) if U is None else unpack(U, like, form)
        ),
        "momentum": lambda: unpack(S, like, form),
        "retention": lambda: like[0].new_ones(B, H) if A is None else A.view(B, H),
        "position": lambda: torch.full_like(state["position"], past + T),
    }
    return o[..., : form.width], {name: new_state[name]() for name in state}


def make_form(q: Tensor, v: Tensor, lr: Tensor, rule: Any, weights: Any) -> TileForm:
    network = rule.network
    hidden = weights[0].shape[-1] if len(weights) == 2 else 0
    tile = launch.power_of_two(rule.mini_batch)
    if hidden:
        hidden = launch.power_of_two(hidden) if hidden < 64 else -(-hidden // 64) * 64
    keys, values = (launch.power_of_two(x.shape[-1]) for x in (q, v))
    tanh = getattr(network, "activation", "") == "gelu_tanh"
    l2, flags = rule.objective.name == "l2", (network.bias, network.layer_norm, network.residual)
    return TileForm(
        rule.mini_batch,
        tile,
        keys,
        values,
        hidden,
        v.shape[-1],
        lr.shape[3],
        *flags,
        l2,
        tanh,
        True,
    )


def pieces(T: int, start: int, C: int) -> Iterator[tuple[int, int, int, int]]:
    """(first token, its place in its mini-batch, tokens, tokens of each mini-batch) of pieces that
    one operator can work off."""
    done = 0
    if start:
        done = min(T, C - start)
        yield 0, start, done, done
    if whole := (T - done) // C * C:
        yield done, 0, whole, C
        done += whole
    if done < T:
        yield done, 0, T - done, T - done


def make_coefficients(
    rule: Any, gates: Any, row: Any, A: Any, n: int, full: bool, form: TileForm
) -> tuple[tuple[Any, ...], Any]:
    """(rates `[G, N, M, C]`, coef `[G, N, 6, C]`, ends `[G, N, 4]`, lam `[G, N, C, C]` or None)
    of G mini-batches of n tokens, zeros beyond; and A at the end. gates: lr, momentum, decay. A:
    from before, `[N]`."""
    (lr, momentum, decay), C = gates, form.tile

    def cells(x: Tensor) -> Tensor:  # [B, G n, H, ..] -> [G, N, n, ..]
        x = x.unflatten(1, (-1, n)).transpose(2, 3)
        return x.transpose(0, 1).flatten(1, 2)

    rates = cells(lr.flatten(3)).mT
    shape = (*rates.shape[:2], n)
    one = rates.new_ones(()).expand(shape)
    zero = rates.new_zeros(()).expand(shape)
    a, s, wl, tl, lam = one, zero, one, zero, None
    s_end, theta = zero[..., -1], zero[..., -1]
    if momentum is not None or decay is not None:
        flat = (None if x is None else cells(x).reshape(1, -1, n) for x in (momentum, decay))
        m, d = flat
        given = rates.new_ones(1, rates.shape[0] * rates.shape[1], n, 1)
        found: Any = rule.token_gates(given, m, None if d is None else 1 - d, None)[0]
        lam, wl = found.L[0], found.w[0].reshape(shape)
        lam = pad(lam.expand(given.shape[1], n, n).unflatten(0, shape[:2]), C, 2)
        if d is not None:
            a = found.A.reshape(shape)
        if m is not None:
            s, tl = found.s.reshape(shape), found.t[0].reshape(shape)
            s_end, theta = s[..., -1], found.theta.reshape(shape[:2])
    u, u_end = a, a[..., -1]  # before A of earlier pieces: U has decayed already
    if A is not None:
        a = a * A[:, None]
    a_end = a[..., -1]
    r = one
    if row is not None:
        r = row.expand(shape)
        s, u = r * s, r * u
        if full:
            wl, u_end, s_end = row[-1] * wl, row[-1] * u_end, row[-1] * s_end
    coef = pad(torch.stack((r, a, s, u, wl, tl), 2), C, 1)
    ends = torch.stack((a_end, s_end, u_end, theta), -1)
    return (pad(rates, C, 1).contiguous(), coef.contiguous(), ends, lam), a_end[-1]


def pad(x: Tensor, size: int, dims: int) -> Tensor:
    missing = size - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing) * dims) if missing else x


def pack(weights: Any, form: TileForm) -> Tensor:
    """One row a head, `[N, P]`: see `mlp_forward`."""
    parts, biases = [], []
    sizes = ((form.keys, form.hidden), (form.hidden, form.values))
    if not form.hidden:
        sizes = ((form.keys, form.values),)
    for m, (w, (rows, columns)) in enumerate(zip(weights, sizes, strict=True)):
        w = w.float().flatten(0, 1)
        if form.bias:
            biases.append(launch.pad_channels(w[:, -1], columns))
            w = w[:, :-1]
        w = torch.nn.functional.pad(w, (0, columns - w.shape[-1], 0, rows - w.shape[-2]))
        parts.append((w.mT if m else w).flatten(1))
    return torch.cat((*parts, *biases), 1)


def unpack(x: Any, like: Any, form: TileForm) -> tuple[Tensor, ...]:
    """The weights of a row, of the shapes of `like`."""
    K, V, F = form.keys, form.values, form.hidden
    sizes = [K * F, V * F, F, V] if F else [K * V, V]
    if not form.bias:
        sizes = sizes[: len(like)]
    found = x.split(sizes, 1)
    weights = []
    for m, w in enumerate(like):
        i, o = w.shape[-2] - form.bias, w.shape[-1]
        y = found[m].unflatten(1, (V, F)).mT if m else found[m].unflatten(1, (K, -1))
        y = y[:, :i, :o]
        if form.bias:
            y = torch.cat((y, found[len(like) + m][:, None, :o]), 1)
        weights.append(y.reshape(w.shape))
    return tuple(weights)
