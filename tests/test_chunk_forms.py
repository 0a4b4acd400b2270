"""The chunk forms that are written to be read: each is its rule's recurrence and its fast form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.attention.forgetting import rule as forgetting
from layerzoo.attention.sliding import rule as sliding
from layerzoo.memories.delta import rule as delta
from layerzoo.memories.fast_weights import Rule, fast_weights
from layerzoo.memories.fast_weights.chunk_form import chunk_form
from layerzoo.memories.linear import rule as linear
from layerzoo.memories.mesa import rule as mesa

B, T, H, K, V = 2, 37, 3, 5, 4
DECAYS = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def inputs(decay: str) -> dict[str, Any]:
    q, k, v = randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, V)
    shape = DECAYS[decay]
    log_decay = None
    if shape is not None:
        strong = -5 * torch.rand(shape, dtype=torch.float64)
        if decay != "constant":
            strong[:, 7] = -torch.inf  # a full reset
        log_decay = strong.requires_grad_()
    return {"q": q, "k": k, "v": v, "log_decay": log_decay}


def close(fn: Any, chunk_form: Any, given: dict[str, Any], **options: Any) -> None:
    """Outputs, final states and all gradients of the op in both implementations."""
    leaves = [x for x in given.values() if isinstance(x, Tensor)]
    outputs = [chunk_form(**given, **options, size=size) for size in (1, 8, 16, T)]
    outputs += [fn(**given, **options, impl=impl) for impl in ("recurrent", "chunked")]
    weights: list[Tensor] = []
    want: list[Tensor] = []
    for o, state in outputs:
        parts = [o, *(state if isinstance(state, tuple) else (state,))]
        weights = weights or [torch.randn_like(part) for part in parts]
        loss = sum((x * w).sum() for x, w in zip(parts, weights, strict=True))
        got = [*parts, *torch.autograd.grad(loss, leaves)]
        finite = [torch.nan_to_num(x, neginf=0.0) for x in got]
        want = want or finite
        torch.testing.assert_close(finite, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_linear_attention(decay: str) -> None:
    given = {**inputs(decay), "state": randn(B, H, K, V)}
    close(linear.linear_attention, linear.chunk_form, given, scale=0.7)


@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule(decay: str) -> None:
    given = inputs(decay)
    unit = F.normalize(given["k"].detach(), dim=-1).requires_grad_()
    beta = torch.rand(B, T, H, dtype=torch.float64).requires_grad_()
    given = {**given, "k": unit, "beta": beta, "state": randn(B, H, K, V)}
    close(delta.delta_rule, delta.chunk_form, given, scale=0.7)


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
def test_mesa(decay: str, steps: int | None) -> None:
    beta = torch.rand(B, T, H, dtype=torch.float64).requires_grad_()
    ridge = (0.5 + torch.rand(H, K, dtype=torch.float64)).requires_grad_()
    given = {**inputs(decay), "beta": beta, "ridge": ridge}
    close(mesa.mesa, mesa.chunk_form, given, steps=steps)


RULES: tuple[dict[str, Any], ...] = (
    {"network": {"name": "linear", "bias": True, "layer_norm": True, "residual": True}},
    {"network": "mlp", "optimiser": "momentum", "forgetting": "decay"},
    {"network": "glu", "objective": "huber", "forgetting": "decay"},
    {"network": "glu", "forgetting": {"name": "norm", "decay": True}, "optimiser": "momentum"},
    {"network": "mlp", "update": "chunk", "optimiser": {"name": "muon", "momentum": True}},
    {"network": "glu", "update": "chunk", "forgetting": "norm", "place": "start"},
    {
        "network": "mlp",
        "update": "chunk",
        "forgetting": {"name": "lq", "decay": True},
        "place": "view",
        "optimiser": "momentum",
    },
)


@pytest.mark.parametrize("options", RULES, ids=str)
def test_fast_weights(options: dict[str, Any]) -> None:
    spec = Rule(mini_batch=6, **options)
    sizes = spec.network.shapes(K, K)
    weights = tuple(randn(H, i + spec.network.bias, o) for i, o in sizes)
    given: dict[str, Any] = {name: randn(B, 18, H, K) for name in "qkv"}
    gate = lambda *shape: torch.rand(B, 18, H, *shape, dtype=torch.float64).requires_grad_()  # noqa: E731
    given["lr"] = (0.1 * torch.rand(B, 18, H, len(weights)).double()).requires_grad_()
    given["momentum"] = gate() if spec.has_momentum else None
    given["decay"] = gate() if spec.has_decay else None
    if spec.update == "token":
        given["row"] = torch.rand(6, dtype=torch.float64).requires_grad_()
    if spec.network.layer_norm:
        given["layer_norm"] = (randn(H, K), randn(H, K))
    flat = [x for x in (*given.values(), *weights) if isinstance(x, Tensor)]
    flat += given.get("layer_norm", ())
    want: list[Tensor] = []
    for impl in ("recurrent", "chunked", None):
        if impl is None:
            o, final = chunk_form(weights=weights, spec=spec, **given)
        else:
            o, state = fast_weights(weights=weights, spec=spec, **given, impl=impl)
            final = state["weights"]
        loss = o.square().sum() + sum(w.square().sum() for w in final)
        got = [o, *final, *torch.autograd.grad(loss, flat, allow_unused=True)]
        got = [torch.zeros(()) if x is None else x for x in got]
        want = want or got
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("window, sinks", [(5, 0), (1, 0), (8, 3), (64, 2)])
def test_sliding_attention(window: int, sinks: int) -> None:
    q, k, v = randn(B, T, 4, K), randn(B, T, 2, K), randn(B, T, 2, V)
    options = {"window": window, "sinks": sinks}
    same(sliding.sliding_attention, sliding.chunk_form, (q, k, v), options)


@pytest.mark.parametrize("window", [None, 1, 7])
def test_forgetting_attention(window: int | None) -> None:
    q, k, v = randn(B, T, 4, K), randn(B, T, 2, K), randn(B, T, 2, V)
    log_forget = (-torch.rand(B, T, 4, dtype=torch.float64)).requires_grad_()
    given = (q, k, v, log_forget)
    same(forgetting.forgetting_attention, forgetting.chunk_form, given, {"window": window})


def same(fn: Any, chunk_form: Any, given: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """Outputs and gradients of attention in both implementations."""
    outputs = [chunk_form(*given, **options, size=size) for size in (1, 16, T)]
    outputs += [fn(*given, **options, impl=impl)[0] for impl in ("recurrent", "chunked")]
    weight = torch.randn_like(outputs[0])
    found = [[o, *torch.autograd.grad((o * weight).sum(), given)] for o in outputs]
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-9, atol=1e-9)
