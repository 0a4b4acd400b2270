"""What the ops of the closed-form memories compute: inputs for which the answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo import SpecError
from layerzoo.memories.delta import delta_rule
from layerzoo.memories.linear import linear_attention
from layerzoo.memories.mesa import mesa

IMPL = pytest.mark.parametrize("impl", ["recurrent", "chunked"])
B, T, H, K, V = 2, 40, 3, 4, 5
Tensors = dict[str, Tensor]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    return F.normalize(randn(*shape), dim=-1)


def orthonormal(n: int) -> Tensor:
    """n keys of n channels, other ones for each row and head: `[B, n, H, n]`."""
    return torch.linalg.qr(randn(B, H, n, n))[0].transpose(1, 2)


def tokens(T: int = T, K: int = K) -> Tensors:
    return {"q": randn(B, T, H, K), "k": unit(B, T, H, K), "v": randn(B, T, H, V)}


def close(got: Tensor, want: Tensor, tol: float = 1e-12) -> None:
    """Equal to `tol` of the largest entry."""
    assert got.shape == want.shape
    atol = tol * float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@IMPL
def test_orthonormal_keys_overwrite(impl: str) -> None:
    """With beta = 1, K of them leave nothing of the state from before: each write is exact."""
    K = 20
    k, v, ones = orthonormal(K).repeat(1, 2, 1, 1), randn(B, 2 * K, H, V), torch.ones(B, 2 * K, H)
    _, state = delta_rule(k, k, v, ones, state=randn(B, H, K, V), impl=impl)
    close(state, torch.einsum("bthk,bthv->bhkv", k[:, K:], v[:, K:]))


@IMPL
def test_the_last_value_of_a_key_is_read_back(impl: str) -> None:
    k, v = unit(B, 1, H, K).expand(B, 70, H, K), randn(B, 70, H, V)
    o, _ = delta_rule(k, k, v, torch.ones(B, 70, H), state=randn(B, H, K, V), impl=impl)
    close(o, v)


@IMPL
@pytest.mark.parametrize("T", [1, 2, 41, 70])
def test_beta_of_two_reflects_the_state(impl: str, T: int) -> None:
    """Parity: an odd number of reflections along the key is one, an even number is none."""
    k, state = unit(B, 1, H, K), randn(B, H, K, V)
    keys, zero, twos = k.expand(B, T, H, K), torch.zeros(B, T, H, V), torch.full((B, T, H), 2.0)
    _, after = delta_rule(keys, keys, zero, twos, state=state, impl=impl)
    along = torch.einsum("bhk,bhl,bhlv->bhkv", k[:, 0], k[:, 0], state)
    close(after, state - 2 * along * (T % 2))


@IMPL
@pytest.mark.parametrize("decay", [None, (B, T, H)])
def test_delta_with_orthonormal_keys_is_linear_attention(impl: str, decay: Any) -> None:
    """The memory knows nothing of a key that is orthogonal to those before it."""
    x, beta, g = {**tokens(K=T), "k": orthonormal(T)}, rand(B, T, H), decay and -rand(*decay)
    o, state = delta_rule(**x, beta=beta, log_decay=g, scale=0.7, impl=impl)
    x["v"] = beta.unsqueeze(-1) * x["v"]
    want, last = linear_attention(**x, log_decay=g, scale=0.7, impl=impl)
    close(o, want)
    close(state, last)


def ridge_memory(T: int = T, K: int = K, decay: bool = True) -> dict[str, Any]:
    """Arguments of mesa, with the state of 7 tokens from before."""
    x: dict[str, Any] = {**tokens(T, K), "beta": rand(B, T, H), "ridge": 0.2 + rand(H, K)}
    past = unit(B, H, 7, K)
    return {
        **x,
        "log_decay": -0.2 * rand(B, T, H) if decay else None,
        "state": (past.mT @ past, past.mT @ randn(B, H, 7, V)),
    }


@IMPL
@pytest.mark.parametrize("steps", [1, None])
@pytest.mark.parametrize("decay", [False, True])
def test_mesa_keeps_two_linear_memories(impl: str, steps: int | None, decay: bool) -> None:
    x = ridge_memory(decay=decay)
    _, states = mesa(**x, steps=steps, impl=impl)
    scaled = x["beta"].unsqueeze(-1) * x["k"]
    for got, first, values in zip(states, x["state"], (x["k"], x["v"]), strict=True):
        close(got, linear_attention(x["q"], scaled, values, x["log_decay"], state=first)[1])


@IMPL
@pytest.mark.parametrize("steps", [30, None])
def test_neutral_gates_of_mesa(impl: str, steps: int | None) -> None:
    """beta = 0 writes nothing, log_decay = 0 is no decay, a constant one is a scalar one."""
    x = ridge_memory()
    gate, zero, constant = (rand(T) < 0.5).double().view(1, T, 1), 0 * x["log_decay"], -rand(H)
    run = {"steps": steps, "impl": impl}
    seen = {n: a[:, gate.flatten() > 0] for n, a in x.items() if n in ("q", "k", "v", "beta")}
    o, (kk, kv) = mesa(**{**x, "beta": gate * x["beta"], "log_decay": zero}, **run)
    want, states = mesa(**{**x, **seen, "log_decay": None}, **run)
    for got, wanted in ((o[:, gate.flatten() > 0], want), (kk, states[0]), (kv, states[1])):
        close(got, wanted, 1e-11)
    o, _ = mesa(**{**x, "log_decay": constant}, **run)
    close(o, mesa(**{**x, "log_decay": constant.expand(B, T, H)}, **run)[0])


@IMPL
@pytest.mark.parametrize("steps", [K, None])
def test_mesa_of_a_huge_ridge_is_linear_attention(impl: str, steps: int | None) -> None:
    """(A + ridge)^-1 = 1 / ridge - A / ridge^2 + .."""
    x, large = ridge_memory(), 1e7
    o, _ = mesa(**{**x, "ridge": large * x["ridge"]}, steps=steps, impl=impl)
    k, q = x["beta"].unsqueeze(-1) * x["k"], x["q"] / x["ridge"]
    want, _ = linear_attention(q, k, x["v"], x["log_decay"], state=x["state"][1])
    close(large * o, want, 1e-5)
    assert (large * o - want).abs().max() > 1e-9


@IMPL
@pytest.mark.parametrize("steps", [1, 30, None])
@pytest.mark.parametrize("ridge", [1e-9, 0.5])
def test_mesa_with_orthonormal_keys(impl: str, steps: int | None, ridge: float) -> None:
    """Each key is an eigenvector: what is read of its value is beta / (beta + ridge), all of it
    if the ridge is tiny."""
    k, v, beta, past = orthonormal(T), randn(B, T, H, V), rand(B, T, H), torch.arange(T) // 2
    ridges = torch.full((H, T), ridge).double()
    o, _ = mesa(k[:, past], k, v, beta, None, ridges, steps=steps, impl=impl)
    close(o, ((beta / (beta + ridge)).unsqueeze(-1) * v)[:, past], 1e-10)
    if ridge < 1e-6:
        close(o[beta[:, past] > 0.1], v[:, past][beta[:, past] > 0.1], 1e-7)


@IMPL
def test_conjugate_gradient_converges(impl: str) -> None:
    x = {**ridge_memory(48, 64), "ridge": torch.full((H, 64), 0.02)}
    exact, _ = mesa(**x, steps=None, impl=impl)
    errors = []
    for steps in (1, 4, 8, 16, 32, 64, 80):
        o, _ = mesa(**x, steps=steps, impl=impl)
        errors.append(float((o - exact).norm() / exact.norm()))
    assert errors[0] > 0.1 and max(errors[-2:]) < 1e-8
    assert all(b < 0.5 * a or b < 1e-12 for a, b in itertools.pairwise(errors)), errors


@IMPL
@pytest.mark.parametrize("steps", [2, 6, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nothing", ["query", "beta", "k", "log_decay"])
def test_mesa_of_nothing(impl: str, steps: int | None, dtype: torch.dtype, nothing: str) -> None:
    """A query of zero, or of a memory that is empty for 21 tokens, reads zero; nothing divides by
    it, and the other tokens read what they would."""
    x = ridge_memory(36)
    kk, kv = x.pop("state")
    if nothing == "query":
        x["q"][:, ::2], empty = 0, slice(0, None, 2)
    else:  # nothing is written, or a reset forgets what was, again and again
        empty = slice(0, 21)
        x["beta" if nothing == "log_decay" else nothing][:, empty] = 0
        x["log_decay"][:, empty] = -torch.inf
    leaves = {n: t.to(dtype).requires_grad_() for n, t in {**x, "kk": kk, "kv": kv}.items()}
    state = (leaves["kk"], leaves["kv"])
    o, states = mesa(**{n: leaves[n] for n in x}, state=state, steps=steps, impl=impl)
    assert (o[:, empty].abs() < 1e-12).all() and (o[:, 35] != 0).all()
    grads = torch.autograd.grad([t.sum() for t in (o, *states)], list(leaves.values()))
    assert all(torch.isfinite(t).all() for t in (o, *states, *grads))
    want, _ = mesa(**x, state=(kk, kv), steps=steps, impl=impl)
    close(o.double(), want, 1e-4 if dtype == torch.float32 else 1e-11)


@IMPL
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6, 1e-10, 1e-17, 1e-19, 1e-30])
def test_mesa_of_a_small_query(impl: str, size: float) -> None:
    """Finite, and true to float32, although residuals are squared."""
    x = ridge_memory(20, 16)
    x["q"][:, ::2] *= size
    exact, _ = mesa(**x, steps=None)
    single = {n: t.float().requires_grad_() for n, t in x.items() if n != "state"}
    state = tuple(s.float() for s in x["state"])
    o, _ = mesa(**single, state=state, impl=impl)
    assert (o[:, ::2] - exact[:, ::2]).abs().max() < 1e-4 * size
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), single.values()))


@IMPL
def test_mesa_refuses(impl: str) -> None:
    x = ridge_memory()
    with pytest.raises(SpecError, match="steps: must be at least 1, or null for the exact solve"):
        mesa(**x, steps=0, impl=impl)
    for shape in ((B, T, H, K), (T, H), (H + 1,)):
        with pytest.raises(
            SpecError, match=r"log_decay: shape \(.*\) is neither \[H\] nor \[B, T"
        ):
            mesa(**{**x, "log_decay": torch.zeros(shape)}, impl=impl)
