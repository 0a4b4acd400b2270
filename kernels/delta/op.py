"""The delta rule's kernels as operators of torch, with their gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launch, vector
from .backward import gradients, reverse_scan
from .forward import outputs, prepare, scan
from .step import step


class Settings(NamedTuple):
    """chunk: tokens. columns: of V, in the scans; `wide`: in `outputs`. block, depth: channels of
    K and of V at a time in `gradients`; inner: those that its squares sum over at once. fused:
    the scan gives the outputs, too. Then the warps and stages of each kernel."""

    chunk: int
    columns: int
    wide: int
    block: int
    depth: int
    inner: int
    fused: bool
    prepare: dict[str, int]
    scan: dict[str, int]
    outputs: dict[str, int]
    reverse: dict[str, int]
    gradients: dict[str, int]


def settings(
    rows: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    target: launch.Target,
    by_channel: bool = False,
) -> Settings:
    """Of `rows` = B H states `[K, V]`. by_channel: with decays of channels, which makes it read
    three tiles of K rather than two.

    With many, the scans fill the machine, and the forward one gives the outputs in the fewest
    bytes. With few, all waits for its chain from chunk to chunk: as little as possible is left
    in it, and few columns a program.
    """

    def of(warps: int, stages: int) -> dict[str, int]:
        return {"num_warps": warps, "num_stages": stages}

    hopper = target.backend == "cuda" and int(target.arch) >= 90
    if dtype == torch.float32:  # products are multiply-adds in registers
        most, block, depth, inner = 16, 16, 16, 16
    elif hopper:  # a warp has 16 of 64 columns
        most, block, depth, inner = 64 if K <= 128 else 32, 64, 64, 128
    else:
        most, block, depth, inner = 32 if K <= 128 else 16, 32, 32, 32
    columns = wide = min(V, most)
    enough = 0.75 * target.multiprocessors
    fused = rows * (V // columns) >= enough
    while columns > 16 and rows * (V // columns) < enough:
        columns //= 2
    if dtype == torch.float32:
        chunk, stages, warps, last = 32 if K <= 64 else 16, 1, 8, 8
    else:
        chunk, last = 64 if K <= 128 else 32, 4 if hopper and K <= 128 else 8
        stages = 1 if target.backend == "hip" else 2
        # Where no other program computes while it waits, the next chunk has to be under way.
        alone = rows * (V // columns) < 2 * target.multiprocessors
        if hopper and alone and not (by_channel and K > 64):
            stages = 3
        warps = 8 if K > 128 else 4
    every = of(4, 1), of(warps, stages), of(4, 1), of(warps, stages), of(last, 1)
    return Settings(chunk, columns, wide, min(K, block), depth, inner, fused, *every)


def plan(q: Tensor, v: Tensor, g: Tensor | None) -> Settings:
    B, _, H, K = q.shape
    by_channel = g is not None and g.dim() == 4
    return settings(B * H, K, v.shape[-1], q.dtype, launch.target(q.device), by_channel)


def chunks(T: int, size: int) -> int:
    return (T + size - 1) // size


def constants(q: Tensor, g: Tensor | None, size: int) -> dict[str, Any]:
    decay = 0 if g is None else g.dim() - 2
    precision = launch.precision(q.dtype)
    _, _, H, K = q.shape
    return {"H": H, "K": K, "C": size, "DECAY": decay, "PRECISION": precision}


@torch.library.custom_op("layerzoo::delta_rule", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what the backward wants with `save`: scores, solve, gates, whole, r
    and states."""
    use = plan(q, v, g)
    (B, T, H, _), V, C = q.shape, v.shape[-1], use.chunk
    N, const = chunks(T, C), constants(q, g, C)
    o, end, scores, solve, gates, whole, r, states = allocate(q, v, g, save, use)
    read, known, fade, A = q, k, k, None
    if const["DECAY"] == 2:
        assert g is not None
        (scores, A), (read, known), fade, whole = vector.forward((q, k), k, g, C)
    args = (q, k, beta, g, A, scores, solve, gates, whole, T, N, B)
    launch.launch(prepare, (N * B * H,), *args, **use.prepare, **const)
    const |= {"V": V, "BV": use.columns}
    given = (read, known, fade, v, beta, scores, solve, gates, whole, state)
    args = (*given, o, end, r, states, scale, T, N, B)
    constant = {**const, "OUT": use.fused, "SAVE": save or not use.fused}
    launch.launch(scan, (B * H * (V // use.columns),), *args, **use.scan, **constant)
    if not use.fused:
        const["BV"] = use.wide
        args = (read, beta, scores, gates, r, states, o, scale, T, N, B)
        launch.launch(outputs, (N * B * H * (V // use.wide),), *args, **use.outputs, **const)
    return o, end, scores, solve, gates, whole, r, states


def allocate(q: Tensor, v: Tensor, g: Tensor | None, save: bool, use: Settings) -> Any:
    (B, T, H, K), V, C, keep = q.shape, v.shape[-1], use.chunk, save or not use.fused
    N, wide, scalar = chunks(T, C), torch.float32, g is not None and g.dim() == 3
    return (
        launch.empty((B, T, H, V), like=q),
        launch.empty((B, H, K, V), like=q, dtype=wide),
        launch.empty((B, T, H, C), like=q),
        launch.empty((B, T, H, C), like=q),
        launch.empty((2, B, T, H) if scalar else (0,), like=q, dtype=wide),
        launch.empty((0,) if g is None else (B, N, *g.shape[2:]), like=q, dtype=wide),
        launch.empty((B, T, H, V) if keep else (0,), like=q),
        launch.empty((B, N, H, V, K) if keep else (0,), like=q),
    )


@forward.register_fake
def _(q: Any, k: Any, v: Any, beta: Any, g: Any, state: Any, scale: float, save: bool) -> Any:
    return allocate(q, v, g, save, plan(q, v, g))


@torch.library.custom_op("layerzoo::delta_rule_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scores: Tensor,
    solve: Tensor,
    gates: Tensor,
    whole: Tensor,
    r: Tensor,
    states: Tensor,
    do: Tensor,
    d_end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, beta, g (empty without one) and of the state given."""
    use = plan(q, v, g)
    (B, T, H, _), V, C = q.shape, v.shape[-1], use.chunk
    N, const = chunks(T, C), constants(q, g, C)
    dq, dk, dv, d_beta, dg, d_state = allocate_gradients(q, k, v, beta, g)
    d_states = launch.empty(states.shape, like=states)
    by_channel = const["DECAY"] == 2
    prepared = vector.forward((q, k), k, g, C) if g is not None and by_channel else None
    (read, known), fade = (prepared.reads, prepared.fades) if prepared else ((q, k), k)
    const |= {"V": V, "BV": use.columns}
    args = (read, known, fade, beta, scores, solve, gates, whole, do, d_end, dv, d_state)
    grid = (B * H * (V // use.columns),)
    launch.launch(reverse_scan, grid, *args, d_states, scale, T, N, B, **use.reverse, **const)
    const |= {"BK": use.block, "BV": min(V, use.depth), "INNER": use.inner}
    const["EXACT"] = q.dtype == torch.float32
    d_scores, d_A = (launch.empty(scores.shape, like=q) for _ in range(2))
    d_fade = d_whole = None
    d_read, d_known, A = dq, dk, None
    if prepared:
        A = prepared.scores[1]
        d_read, d_known, d_fade = (launch.empty(q.shape, like=q) for _ in range(3))
        d_whole = launch.empty(whole.shape, like=whole)
    given = (read, known, fade, beta, g, scores, A, gates, whole, do, r, dv, states, d_states)
    made = (d_read, d_known, d_beta, dg, d_scores, d_A, d_fade, d_whole)
    args = (*given, *made, scale, T, N, B)
    launch.launch(gradients, (N * B * H,), *args, **use.gradients, **const)
    if prepared:
        made: Any = (g, C, (d_scores, d_A), (d_read, d_known), d_fade, d_whole)
        dq, dk, dg = vector.backward((q, k), k, *made)
    return dq, dk, dv, d_beta, dg, d_state


def allocate_gradients(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> Any:
    (B, _, H, K), V, wide = q.shape, v.shape[-1], torch.float32
    return (
        launch.empty(q.shape, like=q),
        launch.empty(k.shape, like=q),
        launch.empty(v.shape, like=q),
        launch.empty(beta.shape, like=beta),
        launch.empty(g.shape if g is not None else (0,), like=beta),
        launch.empty((B, H, K, V), like=q, dtype=wide),
    )


@backward.register_fake
def _(q: Any, k: Any, v: Any, beta: Any, g: Any, *args: Any) -> Any:
    return allocate_gradients(q, k, v, beta, g)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, beta, g, _, ctx.scale, ctx.saved = inputs
    ctx.save_for_backward(q, k, v, beta, g, *output[2:])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, do: Tensor, d_end: Tensor, *_: Any) -> Any:
    q, k, v, beta, g, *saved = ctx.saved_tensors
    do, d_end = do.contiguous(), d_end.contiguous()
    *grads, dg, d_state = backward(q, k, v, beta, g, *saved, do, d_end, ctx.scale)
    return *grads, None if g is None else dg, d_state, None, None


forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("layerzoo::delta_rule_step", mutates_args=())
def one_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same for T = 1."""
    B, _, H, K = q.shape
    V = v.shape[-1]
    columns = min(V, 32 if K <= 128 else 16)
    o, end = launch.empty(v.shape, like=q), launch.empty(state.shape, like=state)
    decay = 0 if g is None else g.dim() - 2
    const = {"H": H, "K": K, "V": V, "BV": columns, "DECAY": decay}
    args = (q, k, v, beta, g, state, o, end, scale)
    launch.launch(step, (B * H * (V // columns),), *args, num_warps=4, num_stages=1, **const)
    return o, end


@one_step.register_fake
def _(q: Any, k: Any, v: Any, beta: Any, g: Any, state: Any, scale: float) -> Any:
    return launch.empty(v.shape, like=q), launch.empty(state.shape, like=state)
