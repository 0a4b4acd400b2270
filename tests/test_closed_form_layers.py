"""The layers of the closed-form memories against a few lines of arithmetic."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo import SpecError, build
from layerzoo.memories.common.matrix import MatrixMemory
from layerzoo.memories.linear.features import FEATURE_MAPS

B, T, H, V, DIM = 2, 40, 3, 5, 24


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(got: Tensor, want: Tensor, tol: float = 1e-12) -> None:
    """Equal to `tol` of the largest entry."""
    assert got.shape == want.shape
    atol = tol * float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_taylor_features() -> None:
    q, k = randn(50, 7), randn(50, 7)
    phi, qk = FEATURE_MAPS["taylor"].phi, q @ k.T
    close(phi(q) @ phi(k).T, 1 + qk + qk**2 / 2)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps(name: str) -> None:
    phi, size, positive, each_positive = FEATURE_MAPS[name]
    features = phi(3 * randn(400, 3))
    assert features.shape == (400, size(3))
    assert ((features @ features.T).min() >= 0) == positive
    assert (features.min() >= 0) == each_positive


KERNELS = {
    "identity": lambda q, k: q @ k.mT,
    "elu1": lambda q, k: (F.elu(q) + 1) @ (F.elu(k) + 1).mT,
    "relu": lambda q, k: F.relu(q) @ F.relu(k).mT,
    "softmax": lambda q, k: q.softmax(-1) @ k.softmax(-1).mT,
    "taylor": lambda q, k: 1 + q @ k.mT + (q @ k.mT) ** 2 / 2,
}


def heads(layer: Any, name: str, x: Tensor) -> Tensor:
    """A projection of x, written out: `[B, H, T, K]`."""
    y = x @ getattr(layer, name).weight.T
    return y.unflatten(-1, (layer.config.heads, -1)).transpose(1, 2)


def mixed(layer: Any, x: Tensor) -> Tensor:
    q, write = layer.project(x)
    return layer.mix(q, write, layer.init_state(len(x)))[0]


@pytest.mark.parametrize("qk_norm", ["l2", "none", "rms"])
@pytest.mark.parametrize("feature_map", KERNELS)
def test_linear_is_attention_without_its_softmax(feature_map: str, qk_norm: str) -> None:
    """o_t = sum_j phi(q_t) phi(k_j) v_j, and with the normaliser their mean; s = q k is scaled as
    the shell says where phi is a function of it."""
    fields = {"feature_map": feature_map, "qk_norm": qk_norm, "heads": H, "value_dim": V}
    fields["key_bias"] = True
    layer, x = build("linear", dim=DIM, **fields).double(), randn(B, T, DIM)
    with torch.no_grad():
        layer.key_bias.copy_(randn(H, layer.key_dim))
    q, k, v = (heads(layer, name, x) for name in "qkv")
    k = k + layer.key_bias[:, None]
    if qk_norm == "l2":
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    elif qk_norm == "rms":
        q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    scale = {"l2": 1.0, "none": 8**-0.5, "rms": 1 / 8}[qk_norm]
    if feature_map in ("identity", "taylor"):
        q = scale * q
    weights = KERNELS[feature_map](q, k).tril()
    close(mixed(layer, x).transpose(1, 2), weights @ v)
    if feature_map != "identity":
        normalised = build("linear", dim=DIM, **fields, normaliser=True).double()
        normalised.load_state_dict(layer.state_dict())
        total = weights.sum(-1, keepdim=True)
        mean = torch.where(total > 1e-6, weights @ v / total, weights @ v * 1e6)
        close(mixed(normalised, x).transpose(1, 2), mean, 1e-10)


@pytest.mark.parametrize(
    "feature_map, decay",
    [
        *itertools.product(("elu1", "softmax"), ("none", "constant", "scalar", "vector")),
        *itertools.product(("taylor",), ("none", "constant", "scalar")),
    ],
)
def test_the_normaliser_reads_back_a_constant(feature_map: str, decay: str) -> None:
    fields = {"feature_map": feature_map, "decay": decay, "normaliser": True, "heads": H}
    layer: Any = build("linear", dim=DIM, **fields).double()
    q, write = layer.project(randn(B, 70, DIM))
    constant = randn(1, 1, H, 8)
    write = write._replace(v=torch.cat((constant.expand(B, 70, H, 8), write.v[..., 8:]), -1))
    if decay == "vector":  # channels that are forgotten at other rates
        write = write._replace(log_decay=5 * write.log_decay)
    o, state = layer.mix(q, write, layer.init_state(B))
    close(o, constant.expand_as(o), 1e-11)
    close(layer.read(q, state), constant.expand_as(o), 1e-11)


def test_the_normaliser_divides_by_at_least_a_millionth() -> None:
    layer: Any = build("linear", dim=DIM, feature_map="relu", normaliser=True)
    for divisor, want in ((0.5, 6.0), (1e-5, 3e5), (1e-8, 3e6), (0.0, 3e6)):
        close(layer.normalised(torch.tensor([[3.0, divisor]])), torch.tensor([[want]]), 1e-6)


@pytest.mark.parametrize("most", [1, 2])
def test_beta_max(most: int) -> None:
    for name in ("delta", "gated_delta", "kda"):
        layer: Any = build(name, dim=DIM, **({"beta_max": 2} if most == 2 else {})).double()
        x = 20 * randn(B, 200, DIM)
        _, write = layer.project(x)
        close(write.beta, most / (1 + (-x @ layer.beta.weight.T).exp()))
        assert 0 < write.beta.min() < 0.01 and 0.99 * most < write.beta.max() <= most


def test_decays_of_the_presets() -> None:
    """At the start, of their own projections; gla's is log sigmoid(z) / 16, nothing else."""
    x = randn(B, 9, DIM)
    for name in ("retention", "gated_linear", "gla", "gated_delta", "kda", "mamba2", "mesa"):
        layer: Any = build(name, dim=DIM, heads=H).double()
        g = layer.log_decay
        if name == "retention":
            close(g().double().exp(), 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128]).double(), 1e-7)
            continue
        z = (g.x(x) + g.bias).unflatten(-1, (H, -1))
        rate, step = g.A_log.exp(), F.softplus(g.bias)
        got = layer.project(x)[1].log_decay
        want = F.logsigmoid(-z) / 16 if name == "gla" else -rate * F.softplus(z)
        close(got, want if name in ("gla", "kda") else want[..., 0], 1e-7)
        low, high = (1, 16) if name == "mamba2" else (1, 1)
        if name != "gla":
            assert (rate >= low - 1e-5).all() and (rate <= high + 1e-5).all()
            assert (step > 0.99e-3).all() and (step < 0.101).all() and step.std() > 0.001
        assert ("x.0.weight" in g.state_dict()) == (name in ("gla", "kda"))  # of rank 16


def test_mamba2() -> None:
    """A loop, as its docstring has it."""
    fields = {"heads": H, "qk_norm": "none", "out_norm": "none"}
    layer: Any = build("mamba2", dim=DIM, **fields).double()
    assert (layer.skip == 1).all()
    torch.nn.init.normal_(layer.skip)
    x = randn(B, T, DIM)
    C, Bs, xs = (heads(layer, name, x) for name in "qkv")
    dt = F.softplus(x @ layer.log_decay.x.weight.T + layer.log_decay.bias).mT
    state, outputs = torch.zeros(B, H, 8, 8).double(), []
    for t in range(T):
        a = (-layer.log_decay.A_log.exp()[:, 0] * dt[:, :, t]).exp()
        write = torch.einsum("bh,bhk,bhv->bhkv", dt[:, :, t], Bs[:, :, t], xs[:, :, t])
        state = a[..., None, None] * state + write
        read = torch.einsum("bhk,bhkv->bhv", C[:, :, t], state) / 8**0.5
        outputs.append((read + layer.skip * xs[:, :, t]).flatten(1))
    y, last = layer(x)
    close(y, torch.stack(outputs, 1) @ layer.out.weight.T)
    close(last, state)


def test_mamba2_with_a_normaliser() -> None:
    """The steps weigh the values, and the skip is not divided: constant values come back."""
    layer: Any = build("mamba2", dim=DIM, heads=H, feature_map="elu1", normaliser=True).double()
    torch.nn.init.constant_(layer.skip, 3.0)
    x = randn(B, T, DIM)
    with torch.no_grad():
        layer.v.weight.zero_()
        q, write = layer.project(x)
        step = layer.log_decay.step(x)
        write = write._replace(v=torch.cat((2 * step.expand(B, T, H, 8), step), -1))
        write = write._replace(skip=write.skip + 5.0)
        o, _ = layer.mix(q, write, layer.init_state(B))
    close(o, torch.full_like(o, 7.0), 1e-11)


PRESETS = [("retention", "linear", "constant"), ("gated_linear", "linear", "scalar")]
PRESETS += [
    ("gla", "linear", "vector"),
    ("gated_delta", "delta", "scalar"),
    ("kda", "delta", "vector"),
]


@pytest.mark.parametrize("name, parent, decay", PRESETS)
def test_a_preset_is_its_parent_with_a_decay(name: str, parent: str, decay: str) -> None:
    preset, x = build(name, dim=DIM, heads=H), torch.randn(B, T, DIM)
    layer = build(parent, dim=DIM, heads=H, decay=decay)
    undecayed = build(parent, dim=DIM, heads=H)
    layer.load_state_dict(preset.state_dict())
    undecayed.load_state_dict(preset.state_dict(), strict=False)
    for got, want, plain in zip(preset(x), layer(x), undecayed(x), strict=True):
        close(got, want, 0.0)
        assert (got - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            {"name": "linear", "normaliser": True},
            "linear: normaliser: feature_map 'identity' with decay 'none' gives sums",
        ),
        (
            {"name": "gla", "normaliser": True, "feature_map": "taylor"},
            "gla: normaliser: feature_map 'taylor' with decay 'vector' .*; use elu1, relu",
        ),
        (
            {"name": "mesa", "decay": "vector"},
            "mesa: decay: expected one of 'none', 'constant', 's",
        ),
        ({"name": "mesa", "steps": 0}, "mesa: steps: must be at least 1, or null, got 0"),
        ({"name": "mesa", "step": 3}, "mesa: unknown field 'step'; did you mean 'steps'"),
        ({"name": "delta", "beta_max": 3}, "delta: beta_max: expected one of 1, 2, got 3"),
        (
            {"name": "mamba2", "decay": "none"},
            "mamba2: decay: expected one of 'scalar', got 'none'",
        ),
    ],
    ids=str,
)
def test_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(spec, dim=DIM)


def test_the_ridge_of_mesa() -> None:
    layer: Any = build("mesa", dim=DIM)
    assert torch.allclose(layer.positive_ridge(), torch.ones(4, 6))
    torch.nn.init.constant_(layer.ridge, -50)
    assert torch.allclose(layer.positive_ridge(), torch.full((4, 6), 0.25))


@pytest.mark.parametrize("name", ["linear", "delta", "mesa"])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_bfloat16_autocast_is_finite(name: str, decay: str, size: float) -> None:
    if (name, decay) == ("mesa", "vector"):
        return
    layer: Any = build(name, dim=DIM, decay=decay, out_gate="silu")
    x = (size * torch.randn(B, 100, DIM)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, tuple(layer(x)[1]) if name == "mesa" else layer(x)[1])
    leaves = [*layer.parameters(), x]
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    states = state if name == "mesa" else (state,)
    assert isinstance(layer, MatrixMemory) and all(s.dtype == torch.float32 for s in states)
    assert all(torch.isfinite(t).all() for t in (y, *states, *grads))
