"""Peers of the memories: the eager forms of transformers, the naive chunk forms of
flash-linear-attention (memories_gpu.py has its kernels), and titans-pytorch. A benchmark imports
these libraries when it runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from layerzoo.layer import State
from layerzoo.tools.bench.peers import Contender, Run, Tensors, Unfit, load, peer

CHUNK = 64
"""Tokens a chunk: the default of all of them but Mamba-2's scan and fla's delta rule."""
FLA: dict[str, Any] = {"module": "fla", "library": "fla-core", "device": "cpu"}
TRANSFORMERS: dict[str, Any] = {"module": "transformers", "library": "transformers"}


def inputs(
    layer: Any, tensors: Tensors, *gates: str, decay: int = 0, multiple: int = 1
) -> Tensors:
    """q, k, v and the gates, and with `decay` (its number of dimensions) log_decay, a constant one
    spread over the tokens.

    Raises:
        Unfit: the layer's config makes other inputs of another rule, or T is no multiple.
    """
    found = dict(tensors)
    if getattr(layer.config, "decay", None) == "constant":
        found["log_decay"] = layer.log_decay().expand(found["q"].shape[:3]).contiguous()
    names = ("q", "k", "v", *gates, *(("log_decay",) if decay else ()))
    plain = found.keys() == set(names) and not getattr(layer.config, "normaliser", False)
    if not plain or (decay and found["log_decay"].dim() != decay):
        raise Unfit("it has no form with these fields")
    if (T := found["q"].shape[1]) % multiple:
        raise Unfit(f"it needs a T that is a multiple of {multiple}, not {T}")
    return {name: found[name] for name in names}


def unscaled(x: Tensors, scale: float) -> Tensors:
    """For a peer that multiplies q by K^-1/2."""
    return {**x, "q": x["q"] * (scale * x["q"].shape[-1] ** 0.5)}


@peer("transformers", "ops", layers=("gated_delta",), **TRANSFORMERS)
def qwen3_next(layer: Any, tensors: Tensors) -> Contender:
    """Qwen3-Next's gated delta rule; a single token goes through its loop over tokens."""
    chunk, loop = load(
        "transformers.models.qwen3_next.modeling_qwen3_next",
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
    )
    x = unscaled(inputs(layer, tensors, "beta", decay=3), layer.scale)

    def with_state(fn: Callable[..., Any], **options: Any) -> Run:
        def run(x: Tensors, state: State) -> tuple[Tensor, State]:
            given = (x[name] for name in ("q", "k", "v", "log_decay", "beta"))
            return fn(*given, initial_state=state, output_final_state=True, **options)

        return run

    run = with_state(chunk, chunk_size=CHUNK)
    return Contender(run, x, step=with_state(loop), carries=True)


@peer("transformers", "ops", layers=("gated_linear", "mamba2"), **TRANSFORMERS)
def mamba2_scan(layer: Any, tensors: Tensors) -> Contender:
    """Mamba-2's scan, with q as C, k as B and v / dt as x, which it multiplies by dt = log_decay /
    -exp(A). Its chunk is 64, at which it is 2 to 3 times faster on a CPU than at its models' 256.
    """
    scan, update = load(
        "transformers.models.mamba2.modeling_mamba2",
        "mamba2_chunk_scan",
        "mamba2_selective_state_update",
    )
    tensors, D = dict(tensors), None
    if tensors.pop("skip", None) is not None:  # of mamba2: D times what v was before dt
        D = layer.skip.detach()[:, 0]
    given = inputs(layer, tensors, decay=3)
    q, dt = given["q"] * layer.scale, given["log_decay"]
    A = -getattr(layer.log_decay, "A_log", dt.new_zeros(layer.heads, 1)).detach().exp()[:, 0]
    dt = dt / A
    x = {"x": given["v"] / dt.unsqueeze(-1), "dt": dt, "B": given["k"], "C": q}

    def run(x: Tensors, state: State) -> tuple[Tensor, State]:
        given = (x["x"], x["dt"], A, x["B"], x["C"], CHUNK, D)
        return scan(*given, initial_states=state, return_final_states=True)

    def step(x: Tensors, state: Tensor) -> tuple[Tensor, State]:
        v, dt, B, C = (t[:, 0] for t in x.values())
        dt, wide = dt.unsqueeze(-1).expand_as(v), A[:, None, None].expand(state.shape[1:])
        skip = None if D is None else D[:, None].expand(v.shape[1:])
        return update(state, v, dt, wide, B, C, skip).unsqueeze(1), state

    return Contender(run, x, step=step, carries=True)


def fla(layer: Any, x: Tensors, module: str, chunk: str, loop: str) -> Contender:
    """A chunk form, and a loop for a single token, that continue from a state."""
    x = {"g" if name == "log_decay" else name: t for name, t in x.items()}

    def with_state(fn: Callable[..., Any]) -> Run:
        def run(x: Tensors, state: State) -> tuple[Tensor, State]:
            return fn(**x, scale=layer.scale, initial_state=state, output_final_state=True)

        return run

    run, step = map(with_state, load(module, chunk, loop))
    return Contender(run, x, step=step, carries=True)


@peer("fla", "ops", layers=("gated_delta",), **FLA)
def fla_gated_delta(layer: Any, tensors: Tensors) -> Contender:
    return fla(
        layer,
        inputs(layer, tensors, "beta", decay=3),
        "fla.ops.gated_delta_rule.naive",
        "naive_chunk_gated_delta_rule",
        "naive_recurrent_gated_delta_rule",
    )


@peer("fla", "ops", layers=("kda",), **FLA)
def fla_kda(layer: Any, tensors: Tensors) -> Contender:
    x = inputs(layer, tensors, "beta", decay=4, multiple=CHUNK)
    return fla(layer, x, "fla.ops.kda.naive", "naive_chunk_kda", "naive_recurrent_kda")


@peer("fla", "ops", layers=("gated_linear", "retention"), **FLA)
def fla_simple_gla(layer: Any, tensors: Tensors) -> Contender:
    return fla(
        layer,
        inputs(layer, tensors, decay=3),
        "fla.ops.simple_gla.naive",
        "naive_chunk_simple_gla",
        "naive_recurrent_simple_gla",
    )


@peer("fla", "ops", layers=("delta",), **FLA)
def fla_delta(layer: Any, tensors: Tensors) -> Contender:
    """Its chunk form returns a state but takes none; layout `[B, H, T, D]`, chunk 32."""
    chunk, loop = load("fla.ops.delta_rule.naive", "delta_rule_chunkwise", "delta_rule_recurrence")
    x = unscaled(inputs(layer, tensors, "beta", multiple=32), layer.scale)

    def run(x: Tensors, state: State) -> tuple[Tensor, State]:
        o, state = chunk(*(t.transpose(1, 2) for t in x.values()))
        return o.transpose(1, 2), state

    def step(x: Tensors, state: State) -> tuple[Tensor, State]:
        o, state = loop(*(t.transpose(1, 2) for t in x.values()), initial_state=state)
        return o.transpose(1, 2), state

    return Contender(run, x, step=step)


@peer("fla", "ops", layers=("linear",), **FLA)
def fla_linear(layer: Any, tensors: Tensors) -> Contender:
    """Its chunk form has no state."""
    (chunk,) = load("fla.ops.linear_attn.naive", "naive_chunk_linear_attn")
    x = inputs(layer, tensors, multiple=CHUNK)
    return Contender(lambda x, state: (chunk(**x, scale=layer.scale), None), x)


@peer("fla", "ops", layers=("mesa",), **FLA)
def fla_mesa(layer: Any, tensors: Tensors) -> Contender:
    """MesaNet with as many steps of its solver, which adds 1e-5 to denominators: it differs from
    ours by 3e-4 for unit q and k, and by more for shorter q."""
    (chunk,) = load("fla.ops.mesa_net.naive", "naive_mesa_net_CG")
    c = layer.config
    if c.steps is None or c.qk_norm != "l2":
        raise Unfit("its solver is another one, except for qk_norm l2 and a number of steps")
    x = inputs(layer, tensors, "beta", decay=3, multiple=CHUNK)
    x = {"g" if name == "log_decay" else name: t for name, t in x.items()}
    ridge = layer.positive_ridge().detach()

    def run(x: Tensors, state: State) -> tuple[Tensor, State]:
        kk, kv = state or (None, None)
        o, *state = chunk(
            **x,
            lamb=ridge,
            chunk_size=CHUNK,
            max_CG_iteration=c.steps,
            h_kk_init=kk,
            h_kv_init=kv,
        )
        return o, state

    return Contender(run, x, carries=True)


@peer("titans", "layers", beside=("memory",), module="titans_pytorch", library="titans-pytorch")
def titans(layer: Any, tensors: Tensors) -> Contender:
    """NeuralMemory with as many heads, and its default memory: an MLP of two layers a head."""
    (NeuralMemory,) = load("titans_pytorch", "NeuralMemory")
    heads = getattr(layer, "heads", 1)
    if layer.dim % heads:
        raise Unfit(f"{heads} heads do not divide {layer.dim}")
    memory = NeuralMemory(layer.dim, CHUNK, heads=heads, dim_head=layer.dim // heads)
    memory = memory.to(tensors["x"])

    def run(tensors: Tensors, state: State) -> tuple[Tensor, State]:
        return memory(tensors["x"], state=state)

    return Contender(run, tensors, tuple(memory.parameters()), step=run, carries=True)
