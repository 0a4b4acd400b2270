"""Peers of the memories on a GPU: the Triton kernels of flash-linear-attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from layerzoo.layer import State
from layerzoo.tools.bench.peers import Contender, Run, Tensors, Unfit, load, peer

from .memories import inputs

LINEAR = {
    "none": ("linear_attn", "linear_attn", {"normalize": False}),
    "constant": ("retention", "retention", {}),
    "scalar": ("simple_gla", "simple_gla", {}),
    "vector": ("gla", "gla", {}),
}
DELTA = {
    "none": ("delta_rule", "delta_rule", {}),
    "scalar": ("gated_delta_rule", "gated_delta_rule", {}),
    "vector": ("kda", "kda", {}),
}
"""By decay: the module, the end of its functions' names, and what they are told beside."""
KERNELS: dict[str, Any] = {"module": "fla", "library": "fla-core", "device": "cuda"}
DIMS = {"none": 0, "constant": 0, "scalar": 3, "vector": 4}


def kernels(layer: Any, tensors: Tensors, table: dict[str, Any], *gates: str) -> Contender:
    """A chunk kernel, and the fused loop over tokens for a single one."""
    decay = layer.config.decay
    if decay not in table:
        raise Unfit(f"it has no kernel with decay '{decay}'")
    module, name, options = table[decay]
    (chunk,) = load(f"fla.ops.{module}", f"chunk_{name}")
    (loop,) = load(f"fla.ops.{module}", f"fused_recurrent_{name}")
    tensors = {key: t for key, t in tensors.items() if key in ("q", "k", "v", "log_decay", *gates)}
    if decay == "constant":
        layer = _WithoutConstant(layer)
    x = inputs(layer, tensors, *gates, decay=DIMS[decay])

    def with_state(fn: Any, gate: str) -> Run:
        def run(x: Tensors, state: State) -> tuple[Tensor, State]:
            x = {gate if key == "log_decay" else key: t for key, t in x.items()}
            more = {"initial_state": state, "output_final_state": True, **options}
            return fn(**x, scale=layer.scale, **more)

        return run

    step = with_state(loop, "gk" if name == "gla" else "g")
    return Contender(with_state(chunk, "g"), x, step=step, carries=True)


class _WithoutConstant:
    """A layer whose constant decay is built into the peer: RetNet's, which is ours."""

    def __init__(self, layer: Any) -> None:
        self.config, self.scale = SimpleNamespace(decay="none"), layer.scale


@peer("fla", "ops", layers=("linear", "gated_linear", "retention", "gla"), **KERNELS)
def fla_linear_kernels(layer: Any, tensors: Tensors) -> Contender:
    if getattr(layer.config, "feature_map", "identity") != "identity":
        raise Unfit("it has no feature map")
    return kernels(layer, tensors, LINEAR)


@peer("fla", "ops", layers=("delta", "gated_delta", "kda"), **KERNELS)
def fla_delta_kernels(layer: Any, tensors: Tensors) -> Contender:
    return kernels(layer, tensors, DELTA, "beta")
