"""The operators of `update: token`: mini-batches of one size, forward and backward.

Forward keeps the weights of every few mini-batches only. Backward takes those groups from the
last to the first: it works a group off again, with the weights of each of its mini-batches, and
what the output's products need, in scratch memory, and then goes back through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launch
from .linear_backward import linear_backward
from .linear_forward import linear_forward
from .mlp_backward import mlp_backward
from .mlp_forward import mlp_forward


class TileForm(NamedTuple):
    """Of the call. tokens: of a mini-batch; tile: with padding. hidden: 0 is the linear network.
    width: of v without padding. matrices: rates of a token. full: mini-batches end here."""

    tokens: int
    tile: int
    keys: int
    values: int
    hidden: int
    width: int
    matrices: int
    bias: bool
    norm: bool
    residual: bool
    l2: bool
    tanh: bool
    full: bool


class Settings(NamedTuple):
    tile: int
    """Of the hidden dimension."""
    num_warps: int
    num_stages: int
    guard: bool = False
    """A barrier before weights are written, where products may take them past shared memory."""
    back: tuple[int, int, int] | None = None
    """Tile, warps and stages of the backward kernel, if not the same and one stage."""


def settings(form: TileForm, dtype: torch.dtype, target: launch.Target) -> Settings:
    """Products have 64 rows, which four warps share: more would only repeat them. On Hopper tiles
    of 64: with 16 and 32 the backward kernel of 64 tokens has accessed illegal memory there,
    though its PTX accesses none."""
    if dtype == torch.float32:
        return Settings(min(form.hidden, 16), 8, 1)
    hip = target.backend == "hip"
    tile = 16 if hip else 32 if int(target.arch) < 90 else 64
    wide = max(form.keys, form.values, form.tile) > 64
    return Settings(min(form.hidden, tile), 8 if wide else 4, 1, hip)


def constants(form: TileForm, dtype: torch.dtype, FT: int) -> dict[str, Any]:
    found = {
        "K": form.keys, "V": form.values, "C": form.tile, "VT": form.width, "BIAS": form.bias,
        "NORM": form.norm, "RESIDUAL": form.residual, "L2": form.l2, "FULL": form.full,
        "IP": launch.precision(dtype),
    }  # fmt: skip
    if form.hidden:
        found |= {"F": form.hidden, "FT": FT, "M": form.matrices, "TANH": form.tanh}
    return found


def row_size(form: TileForm) -> int:
    K, V, F = form.keys, form.values, form.hidden
    return (K + V) * F + (F + V) * form.bias if F else K * V + V * form.bias


def turn_size(form: TileForm) -> int:
    """Of the scratch of a program of the forward kernel."""
    return form.tile * (3 * form.values + 2 * form.keys + form.tile) if form.hidden else 0


def forward(
    given: Sequence[Any], form: TileForm, o: Any, w: Tensor, s: Any, kept: Any, turn: Any,
    first: int, count: int, step: int,
) -> None:  # fmt: skip
    """Launch `count` mini-batches from `first` on; w, s: buffers from the slot that is read."""
    q, k, v, rates, coef, ends, lam, gamma, beta, u = given
    T, H = q.shape[1:3]
    got = settings(form, q.dtype, launch.target(q.device))
    args = [q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, o]
    if form.hidden:
        args += [turn, *kept]
        kernel = mlp_forward
        more: dict[str, Any] = {"GUARD": got.guard}
    else:
        args += kept[:2]
        kernel, more = linear_forward, {}
    launch.launch(
        kernel, (q.shape[0] * H,), *args, T, first, count, step, form.tokens,
        num_warps=got.num_warps, num_stages=got.num_stages,
        H=H, **constants(form, q.dtype, got.tile), **more,
    )  # fmt: skip


def group_size(count: int) -> int:
    """Mini-batches between two that keep their weights: the least memory in all."""
    return max(1, round(count**0.5))


@torch.library.custom_op("layerzoo::fast_weights_token", mutates_args=())
def token_forward(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, coef: Tensor, ends: Tensor,
    lam: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    w: Tensor, u: Tensor | None, s: Tensor | None, form: Sequence[int], keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the weights (or updates) at the end, the momentum, and checkpoints of both."""
    f = TileForm._make(form)
    count, N, P = rates.shape[0], *w.shape
    G = group_size(count) if keep else count
    groups = -(-count // G)
    buffers = []
    for x in (w, s):
        if x is None:
            buffers.append(None)
            continue
        buffers.append(launch.empty((groups + 1, N, P), like=w))
        buffers[-1][0].copy_(x)
    W, S = buffers
    o = launch.empty(v.shape, like=q)
    turn = launch.empty((N, turn_size(f)), like=q)
    given = (q, k, v, rates, coef, ends, lam, gamma, beta, u)
    for g in range(groups):
        size = min(G, count - g * G)
        at = (W[g:], None if S is None else S[g:])
        forward(given, f, o, *at, (None, None, None), turn, g * G, size, 0)
    ends_ = (W[-1].clone(), w.new_empty(0) if S is None else S[-1].clone())
    kept = (x[:-1] if keep and x is not None else w.new_empty(0) for x in (W, S))
    found: Any = (o, *ends_, *kept)
    return found


@token_forward.register_fake
def _(q, k, v, rates, coef, ends, lam, gamma, beta, w, u, s, form, keep):
    count = rates.shape[0]
    groups = -(-count // group_size(count)) if keep else 0
    none = w.new_empty(0)
    kept = [none if x is None or not keep else x.new_empty(groups, *x.shape) for x in (w, s)]
    return (
        q.new_empty(v.shape),
        torch.empty_like(w),
        none if s is None else torch.empty_like(s),
        *kept,
    )


@torch.library.custom_op("layerzoo::fast_weights_token_backward", mutates_args=())
def token_backward(
    d_o: Tensor, d_w: Tensor, d_s: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, coef: Tensor, ends: Tensor,
    lam: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    w: Tensor, u: Tensor | None, s: Tensor | None, form: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of q .. beta, w, u, s, as far as these are there. w, s: the checkpoints."""
    f = TileForm._make(form)
    count, (_, N, P) = rates.shape[0], w.shape
    G = group_size(count)
    like = [q, k, v, rates, coef, ends, lam]
    found = [None if x is None else launch.empty(x.shape, like=x) for x in like]
    found += [None if x is None else torch.zeros_like(x) for x in (gamma, beta)]
    d_w = d_w.clone(memory_format=torch.contiguous_format)
    d_s = None if s is None or d_s is None else d_s.clone(memory_format=torch.contiguous_format)
    d_u = None if u is None else launch.empty((N, P), like=w)
    C, V = f.tile, f.values
    size = min(G, count)
    W: Any
    W, S = (None if x is None else launch.empty((size + 1, N, P), like=w) for x in (w, s))
    kept = [launch.empty((size, N, C, x), like=w) for x in (V, V, C)]
    turn = launch.empty((3, N, C, V), like=q)
    more, again = (turn,), launch.empty((N, turn_size(f)), like=q)
    if f.hidden:
        more = (turn, launch.empty((4, N, C, C), like=q), launch.empty((N, C, C), like=w))
        more += launch.empty((3, N, C, f.hidden), like=q), launch.empty((N, C, f.hidden), like=w)
    given = (q, k, v, rates, coef, ends, lam, gamma, beta, u)
    got = settings(f, q.dtype, launch.target(q.device))
    tile, warps, stages = got.back or (got.tile, got.num_warps, 1)
    T, H = q.shape[1:3]
    if not f.hidden:
        kept = kept[:2]
    for g in reversed(range(w.shape[0])):
        first, n = g * G, min(G, count - g * G)
        for x, start in ((W, w), (S, s)):
            if x is not None and start is not None:
                x[0].copy_(start[g])
        forward(given, f, None, W, S, kept, again, first, n, 1)
        launch.launch(
            mlp_backward if f.hidden else linear_backward, (N,),
            *given[:9], W, S, u, *kept, d_o, d_w, d_s, d_u, *found, *more, T, first, n, f.tokens,
            num_warps=warps, num_stages=stages,
            H=H, **constants(f, q.dtype, tile),
        )  # fmt: skip
    return [x for x in (*found, d_w, d_u, d_s) if x is not None]


@token_backward.register_fake
def _(d_o, d_w, d_s, q, k, v, rates, coef, ends, lam, gamma, beta, w, u, s, form):
    like = (q, k, v, rates, coef, ends, lam, gamma, beta, w[0], u, None if s is None else s[0])
    return [x.new_empty(x.shape) for x in like if x is not None]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *given, form, _ = inputs
    w, u, s = given[-3:]
    *_, W, S = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given[:9], W, u, None if s is None else S)
    ctx.form, ctx.shapes = form, (w.shape, w.dtype)
    ctx.present = [x is not None for x in given]


def _backward(ctx: Any, d_o: Any, d_w: Any, d_s: Any, *_: Any) -> Any:
    saved = ctx.saved_tensors
    q, v, w, s = saved[0], saved[2], saved[9], saved[11]
    d_o = torch.zeros_like(v) if d_o is None else d_o.contiguous()
    zeros = w.new_zeros(w.shape[1:])
    d_w = zeros if d_w is None else d_w
    d_s = None if s is None else zeros if d_s is None else d_s
    grads = iter(token_backward(d_o.to(q.dtype), d_w, d_s, *saved, ctx.form))
    return *(next(grads) if there else None for there in ctx.present), None, None


token_forward.register_autograd(_backward, setup_context=_setup)


def operator(given: tuple[Any, ...], form: TileForm) -> tuple[Tensor, Tensor, Any]:
    """o, the weights at the end (updates, unless form.full), and the momentum. given: what
    `token_forward` takes."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    o, end, S, *_ = token_forward(*given, [int(x) for x in form], keep)
    return o, end, None if given[-1] is None else S
