"""The operators that torch sees: the op's forward, its gradients, and one step of decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import launch, vector
from . import channels, scan, step

Gate = Tensor | None


def strides(g: Gate) -> tuple[int, int, int]:
    """Of the batch, token and head of a decay [H] or [B, T, H]."""
    if g is None:
        return 0, 0, 0
    return (0, 0, g.stride(0)) if g.ndim == 1 else (g.stride(0), g.stride(1), g.stride(2))


def tile_of(q: Tensor, R: int, C: int) -> dict[str, Any]:
    heads = q.shape[0] * q.shape[2]
    return scan.settings(R, C, q.element_size(), launch.target(q.device), heads)


def parts(T: int, slots: int) -> tuple[int, int]:
    """Tokens of a segment, a multiple of any chunk but in a single one, and segments: at most
    `slots`, none shorter than 256 but the last."""
    tokens = T if slots == 1 else max(256, 64 * -(-T // (64 * slots)))
    return (tokens, -(-T // tokens)) if tokens < T else (T, 1)


def split(
    y: Tensor, z: Tensor, g: Gate, first: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, int]:
    """The states before the segments (after them in reverse), [B, H, slots, R, C], `first` itself
    if there is only one; and the tokens of a segment."""
    B, T, H, R = y.shape
    C = z.shape[3]
    tile = tile_of(y, R, C)
    slots = tile.pop("slots")
    tokens, N = parts(T, slots)
    if N == 1:
        return first.unsqueeze(2), tokens
    M = tokens // tile["BT"]
    states = launch.empty((B, H, slots, R, C), like=first)
    wholes = launch.empty((B, H, slots), like=first)
    options: dict[str, Any] = {"REVERSE": reverse}
    launch.launch(
        scan.gather, (B * H * C // tile["BC"], N - 1), y, z, g, states, wholes, *strides(g),
        scale, T, M, slots, H, R=R, C=C, PRECISION=launch.precision(y.dtype), **tile, **options,
    )  # fmt: skip
    block = min(R * C, 512)
    launch.launch(
        scan.chain, (B * H * R * C // block,), first, states, wholes, N, slots,
        SIZE=R * C, K=1, BLOCK=block, **options,
    )  # fmt: skip
    return states, tokens


def run_scan(
    x: Tensor, y: Tensor, z: Tensor, g: Gate, states: Tensor, tokens: int, scale: float,
    last: Tensor | None = None, kept: tuple[Tensor, Tensor, Tensor] | None = None, *,
    reverse: bool = False, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """o of `scan.scan`, in segments of `tokens`; states: before those. kept: (W, kept, dG)."""
    B, T, H, R = x.shape
    C = z.shape[3]
    tile = tile_of(x, R, C)
    tile.pop("slots")
    M, N = -(-tokens // tile["BT"]), -(-T // tokens)
    o = launch.empty((B, T, H, C), like=x)
    launch.launch(
        scan.scan, (B * H * C // tile["BC"], N), x, y, z, o, g, states, last,
        *(kept or (None, None, None)), *strides(g), scale, T, M, states.shape[2], H, R=R, C=C,
        REVERSE=reverse, TRANSPOSED=transposed, PRECISION=launch.precision(x.dtype), **tile,
    )  # fmt: skip
    return o


def vector_tile(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Both ways of the state have chunks of one size: what is prepared is of chunks."""
    K, V = q.shape[3], v.shape[3]
    return {**tile_of(q, K, V), "BT": min(tile_of(q, *n)["BT"] for n in ((K, V), (V, K)))}


def vector_split(
    y: Tensor, z: Tensor, whole: Tensor, first: Tensor, scale: float, reverse: bool
) -> tuple[Tensor, int]:
    """As `split`; y and z are fades and v, or in reverse reads and do."""
    (B, T, H, K), V = y.shape, z.shape[3]
    tile = vector_tile(y, z)
    slots = tile["slots"]
    tokens, N = parts(T, slots)
    if N == 1:
        return first.unsqueeze(2), tokens
    states = launch.empty((B, H, slots, K, V), like=first)
    wholes = launch.empty((B, H, slots, K), like=first)
    launch.launch(
        channels.gather, (B * H * V // tile["BC"], N - 1), y, z, whole, states, wholes, scale, T,
        tokens // tile["BT"], slots, H, K=K, V=V, BT=tile["BT"], BV=tile["BC"], REVERSE=reverse,
        PRECISION=launch.precision(y.dtype), num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )  # fmt: skip
    block = min(K * V, 512)
    launch.launch(
        scan.chain, (B * H * K * V // block,), first, states, wholes, N, slots, SIZE=K * V, K=K,
        BLOCK=block, REVERSE=reverse,
    )  # fmt: skip
    return states, tokens


def vector_scan(
    x: Tensor, y: Tensor, z: Tensor, A: Gate, whole: Tensor, states: Tensor, tokens: int,
    scale: float, last: Gate = None, kept: Gate = None, d_whole: Gate = None, *,
    reverse: bool = False, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """out of `channels.scan`."""
    (B, T, H, R), C = x.shape, z.shape[3]
    tile = {**tile_of(x, R, C), "BT": vector_tile(x, z)["BT"]}
    del tile["slots"]
    M, N = -(-tokens // tile["BT"]), -(-T // tokens)
    out = launch.empty((B, T, H, C), like=x)
    launch.launch(
        channels.scan, (B * H * C // tile["BC"], N), x, y, z, out, A, whole, states, last, kept,
        d_whole, scale, T, M, states.shape[2], H, R=R, C=C, REVERSE=reverse,
        TRANSPOSED=transposed, PRECISION=launch.precision(x.dtype), **tile,
    )  # fmt: skip
    return out


def vector_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (A,), (reads,), fades, whole = vector.forward((q,), k, g, vector_tile(q, v)["BT"])
    states, tokens = vector_split(fades, v, whole, state, scale, False)
    last = launch.empty(state.shape, like=state)
    return vector_scan(reads, fades, v, A, whole, states, tokens, scale, last), last


def vector_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, do: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g and the state. What was prepared is prepared again."""
    (B, T, H, K), V = q.shape, v.shape[3]
    BT = vector_tile(q, v)["BT"]
    (A,), (reads,), fades, whole = vector.forward((q,), k, g, BT)
    kept = launch.empty((B, H, -(-T // BT), V, K), like=q)
    dA, d_whole = launch.empty(A.shape, like=A), launch.empty(whole.shape, like=whole)
    d_state = launch.empty(state.shape, like=state)
    back: dict[str, Any] = {"reverse": True}
    at = vector_split(fades, v, whole, state, scale, False)
    d_reads = vector_scan(do, v, fades, dA, whole, *at, scale, None, kept, transposed=True)
    at = vector_split(reads, do, whole, d_last, scale, True)
    dv = vector_scan(fades, reads, do, A, whole, *at, scale, d_state, **back)
    d_fades = vector_scan(
        v, do, reads, None, whole, *at, scale, None, kept, d_whole, transposed=True, **back
    )
    dq, dk, dg = vector.backward((q,), k, g, BT, (dA,), (d_reads,), d_fades, d_whole)
    return dq, dk, dv, dg, d_state


@torch.library.custom_op("layerzoo::linear_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    if g is not None and g.ndim == 4:
        return vector_forward(q, k, v, g, state, scale)
    states, tokens = split(k, v, g, state, scale, False)
    last = launch.empty(state.shape, like=state)
    return run_scan(q, k, v, g, states, tokens, scale, last), last


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Gate, state: Tensor, scale: float) -> Any:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("layerzoo::linear_attention_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float,
    do: Tensor, d_last: Tensor, with_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (empty without `with_g`, but per channel) and the state."""
    q, k, v, state, do, d_last = (x.contiguous() for x in (q, k, v, state, do, d_last))
    if g is not None and g.ndim == 4:
        return vector_backward(q, k, v, g, state, scale, do, d_last)
    (B, T, H, K), V = q.shape, v.shape[3]
    tile = tile_of(q, V, K)
    at_q = at_k = None
    dg = launch.empty((K // tile["BC"] if with_g else 0, B, T, H), like=state)
    if with_g:
        chunks = -(-T // tile["BT"])
        kept = launch.empty((B, H, chunks, V, K), like=q)
        at_q, at_k = (q, kept, dg), (k, kept, dg)
    states, tokens = split(k, v, g, state, scale, False)
    dq = run_scan(do, v, k, g, states, tokens, scale, None, at_q, transposed=True)
    states, tokens = split(q, do, g, d_last, scale, True)
    d_state = launch.empty(state.shape, like=state)
    dv = run_scan(k, q, do, g, states, tokens, scale, d_state, reverse=True)
    dk = run_scan(v, do, q, g, states, tokens, scale, None, at_k, reverse=True, transposed=True)
    return dq, dk, dv, reduced(dg, g) if with_g else dg.view(0), d_state


def reduced(dg: Tensor, g: Gate) -> Tensor:
    """Of the partial sums [blocks, B, T, H], the gradient of g."""
    if g is not None and g.ndim == 1:
        return dg.sum((0, 1, 2), dtype=torch.float64).float()  # of all B T tokens
    return dg[0] if len(dg) == 1 else dg.sum(0)


@backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Gate, state: Tensor, scale: float, do: Tensor,
    d_last: Tensor, with_g: bool,
) -> Any:  # fmt: skip
    has_g = g is not None and (with_g or g.ndim == 4)
    dg = state.new_empty(g.shape if g is not None and has_g else (0,))
    new = (x.new_empty(x.shape) for x in (q, k, v))
    return *new, dg, state.new_empty(state.shape)


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def run_backward(ctx: Any, do: Tensor, d_last: Tensor) -> Any:
    q, k, v, g, state = ctx.saved_tensors
    with_g = ctx.needs_input_grad[3]
    *grads, dg, d_state = backward(q, k, v, g, state, ctx.scale, do, d_last, with_g)
    return *grads, dg if with_g else None, d_state, None


forward.register_autograd(run_backward, setup_context=keep)


@torch.library.custom_op("layerzoo::linear_attention_step", mutates_args=())
def decode_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """T = 1, without gradients."""
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    B, _, H, K = q.shape
    V = v.shape[3]
    o, new = launch.empty(v.shape, like=v), launch.empty(state.shape, like=state)
    vector = g is not None and g.ndim == 4
    g = g.contiguous() if g is not None and vector else g
    gb, _, gh = strides(g)
    tile = step.settings(K, V, launch.target(q.device))
    launch.launch(
        step.step, (B * H * -(-V // tile["BV"]),), q, k, v, g, state, o, new, gb, gh,
        scale, H, K=K, V=V, VECTOR=vector, **tile,
    )  # fmt: skip
    return o, new


@decode_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Gate, state: Tensor, scale: float) -> Any:
    return v.new_empty(v.shape), state.new_empty(state.shape)
