"""The public ops against golden data of other implementations (tests/vectors/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerzoo.attention.deltaformer import delta_attention
from layerzoo.attention.forgetting import forgetting_attention
from layerzoo.attention.sliding import sliding_attention
from layerzoo.attention.softmax import softmax_attention
from layerzoo.memories.delta import delta_rule
from layerzoo.memories.linear import linear_attention
from layerzoo.memories.mesa import mesa
from layerzoo.nn import log_decay

VECTORS = Path(__file__).parent / "vectors"
IMPLS = ("recurrent", "chunked")
LINEAR = {"linear": None, "retention": "log_decay", "simple_gla": "g", "gla": "g"}
DELTA = {"delta": None, "gated_delta": "g", "kda": "g"}
MATRIX = [f"{rule}_{case}" for rule in (*LINEAR, *DELTA) for case in ("plain", "init")]
SLIDING = ["swa_nosink", "swa_sink"]
FORGETTING = ["fox_full", "fox_window"]
MESA = ["mesa_plain", "mesa_init"]
SINK_LOGIT = ["sink_logit", "sink_logit_window"]
DELTAFORMER = ["deltaformer"]
ALL = MATRIX + SLIDING + FORGETTING + MESA + SINK_LOGIT + DELTAFORMER


def load(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arrays as tensors, of `dtype` where they are inputs; scalars as numbers."""
    with np.load(VECTORS / f"{name}.npz") as file:
        data: dict[str, Any] = {}
        for key, array in file.items():
            data[key] = torch.from_numpy(array) if array.ndim else array.item()
    for key in inputs(data):
        data[key] = data[key].to(dtype).requires_grad_(f"d_{key}" in data)
    return data


def inputs(data: dict[str, Any]) -> list[str]:
    names = ("q", "k", "v", "g", "log_decay", "beta", "lamb", "initial_state")
    names += ("initial_state_kk", "initial_state_kv", "sink_logit")
    return [name for name in names if name in data]


def run(name: str, data: dict[str, Any], impl: str) -> dict[str, Tensor]:
    """The outputs of the op that the file is about, named as in the file."""
    rule = name.rsplit("_", 1)[0]
    if rule == "mesa":
        return run_mesa(data, impl, steps=None)
    if name in DELTAFORMER:
        args = [data[key] for key in ("q", "k", "v", "beta")]
        return {"o": delta_attention(*args, impl=impl)[0]}
    q, k, v, scale = (data[key] for key in ("q", "k", "v", "scale"))
    if name in SINK_LOGIT:
        how = {"scale": scale, "sink_logit": data["sink_logit"], "impl": impl}
        if data["window"] < 0:
            return {"o": softmax_attention(q, k, v, **how)[0]}
        return {"o": sliding_attention(q, k, v, window=data["window"], **how)[0]}
    if rule == "swa":
        window, sinks = data["window"], data["sinks"]
        o, _ = sliding_attention(q, k, v, window=window, sinks=sinks, scale=scale, impl=impl)
        return {"o": o}
    if rule == "fox":
        o, _ = forgetting(data, q, k, v, data["g"], impl=impl)
        return {"o": o}
    decay = data.get({**LINEAR, **DELTA}[rule] or "")
    op: Callable[..., Any] = linear_attention if rule in LINEAR else delta_rule
    args = (q, k, v, decay) if rule in LINEAR else (q, k, v, data["beta"], decay)
    o, state = op(*args, scale=scale, state=data.get("initial_state"), impl=impl)
    return {"o": o, "final_state": state}


def forgetting(data: dict[str, Any], *tensors: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
    window = data["window"] if data["window"] > 0 else None
    return forgetting_attention(*tensors, window=window, scale=data["scale"], **kwargs)


def run_mesa(data: dict[str, Any], impl: str, steps: int | None) -> dict[str, Tensor]:
    args = [data[key] for key in ("q", "k", "v", "beta", "g", "lamb")]
    start = "initial_state_kk" in data
    state = (data["initial_state_kk"], data["initial_state_kv"]) if start else None
    o, (kk, kv) = mesa(*args, steps=steps, state=state, impl=impl)
    return {"o": o, "final_state_kk": kk, "final_state_kv": kv}


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


def test_every_file_is_used() -> None:
    """tests/test_fast_weights_vectors.py has the fast weights; `kda_gates` is of no op."""
    fast = ("ttt", "titans", "lact", "allmem")
    found = [p.stem for p in VECTORS.glob("*.npz")]
    assert sorted(f for f in found if not f.startswith(fast)) == sorted([*ALL, "kda_gates"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_vectors(name: str, dtype: torch.dtype, impl: str) -> None:
    data = load(name, dtype)
    double = dtype == torch.float64
    outputs = run(name, data, impl)
    low = 1e-4 if name.rsplit("_", 1)[0] in LINEAR else 2e-5
    for key, x in outputs.items():
        assert x.dtype == dtype
        close(x, data[key], 1e-11 if double else low)
    weights = [key for key in data if key.startswith("w_")]
    assert {key[2:] for key in weights} <= outputs.keys()
    if not weights:
        assert name.endswith(("_plain", "_nosink", "_full"))
        return
    loss = sum((outputs[key[2:]] * data[key].to(dtype)).sum() for key in weights)
    assert isinstance(loss, Tensor)
    names = inputs(data)
    for key, grad in zip(names, torch.autograd.grad(loss, [data[n] for n in names]), strict=True):
        want = data[f"d_{key}"]
        close(grad, want, (1e-9 if double else 1e-3) * float(want.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MESA)
def test_conjugate_gradient_reaches_the_exact_solve(name: str, impl: str) -> None:
    """K = 8 steps are exact in exact arithmetic; in float64 a few more, and far more, are."""
    data = load(name, torch.float64)
    for steps in (10, 30):
        for key, x in run_mesa(data, impl, steps).items():
            close(x, data[key], 1e-11)
    few = run_mesa(data, impl, 2)["o"]
    assert (few - data["o"]).abs().max() > 1e-4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SLIDING)
def test_a_window_of_the_whole_sequence_is_softmax(name: str, impl: str) -> None:
    data = load(name, torch.float64)
    q, k, v = (data[key].detach() for key in "qkv")
    want, _ = softmax_attention(q, k, v, impl=impl)
    for window in (q.shape[1], 10 * q.shape[1]):
        got, _ = sliding_attention(q, k, v, window=window, sinks=data["sinks"], impl=impl)
        close(got, want, 1e-12)
    short, _ = sliding_attention(q, k, v, window=q.shape[1] - 1, impl=impl)
    assert (short - want)[:, -1].abs().max() > 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORGETTING)
def test_forgetting_in_pieces(name: str, dtype: torch.dtype, impl: str) -> None:
    """The outputs, and gradients through the caches, of a sequence cut where windows straddle."""
    data, double = load(name, dtype), dtype == torch.float64
    tensors = [data[key] for key in ("q", "k", "v", "g")]
    outputs, state = [], None
    for piece in zip(*(t.split([17, 1, 0, t.shape[1] - 18], 1) for t in tensors), strict=True):
        o, state = forgetting(data, *piece, state=state, impl=impl)
        outputs.append(o)
    close(torch.cat(outputs, 1), data["o"], 1e-11 if double else 2e-5)
    whole = forgetting(data, *tensors, impl=impl)[1]
    assert state is not None and state.keys() == whole.keys()
    for key, got in state.items():
        assert torch.equal(got, whole[key])
    if "w_o" in data:
        loss = (torch.cat(outputs, 1) * data["w_o"].to(dtype)).sum()
        for key, grad in zip("qkvg", torch.autograd.grad(loss, tensors), strict=True):
            want = data[f"d_{key}"]
            close(grad, want, (1e-9 if double else 1e-3) * float(want.abs().max()))


def test_the_gates_of_a_decay() -> None:
    data = load("kda_gates", torch.float64)
    z, A_log, bias = (data[name].requires_grad_() for name in ("z", "A_log", "bias"))
    gates = {
        name: log_decay(z + bias, A_log[:, None], bounded)
        for name, bounded in (("g", False), ("g_bounded", True))
    }
    assert data["lower_bound"] == -5
    for name, gate in gates.items():
        torch.testing.assert_close(gate, data[name], atol=1e-11, rtol=0)
    sum((gate * data[f"w_{name}"]).sum() for name, gate in gates.items()).backward()
    for name, leaf in (("z", z), ("A_log", A_log), ("bias", bias)):
        torch.testing.assert_close(leaf.grad, data[f"d_{name}"], atol=1e-9, rtol=0)
