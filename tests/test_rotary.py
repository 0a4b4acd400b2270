"""Scalings of rotary positions against their formulas, with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo.registry import build
from layerzoo.rotary import SCALINGS, rotary
from layerzoo.spec import SpecError

BASE, HALF = 10000.0, 64
N = torch.arange(HALF, dtype=torch.float64)
THETA = BASE ** (-N / HALF)


def scaled(name: str, theta: Tensor = THETA, base: float = BASE, **fields: Any) -> Tensor:
    return SCALINGS[name](**fields)(theta, base)


def close(got: Any, want: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=tol, atol=0)


def test_linear_stretches_positions() -> None:
    close(scaled("linear", factor=4.0), THETA / 4)
    x = torch.randn(1, 9, 2, 8, dtype=torch.float64)
    far = rotary(x, 0, 100.0)[:, 2:3]
    close(rotary(x[:, 2:3], 8, 100.0, SCALINGS["linear"](factor=4.0)), far)


def test_ntk_is_a_larger_base() -> None:
    got = scaled("ntk", factor=8.0)
    close(got, (BASE * 8 ** (128 / 126)) ** (-N / HALF))
    close(got[0], THETA[0])
    close(got[-1], THETA[-1] / 8)


def test_yarn_by_the_turns_of_each_frequency() -> None:
    """K = 128, base 10000, 4096 tokens: theta_n turns 32 times at n = 20.94 and once at 45.03, so
    that 20 and before are kept, 46 and after are divided, and 33 is half way."""
    got = scaled("yarn", factor=16.0, original_length=4096)
    close(got[:21], THETA[:21])
    close(got[46:], THETA[46:] / 16)
    close(got[33], THETA[33] * (0.5 + 0.5 / 16))
    close(got[21], THETA[21] * (25 / 26 + 1 / 26 / 16))
    assert SCALINGS["yarn"](factor=16.0, original_length=9).magnitude() == 0.1 * math.log(16) + 1
    own = SCALINGS["yarn"](factor=16.0, original_length=9, attention=1.5)
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    close(rotary(x, 5, BASE, own).norm(dim=-1), 1.5 * x.norm(dim=-1))


def test_llama3_by_the_turns_of_each_frequency() -> None:
    """Llama 3.1: K = 128, base 500000, 8192 tokens, factor 8, 1 to 4 turns: from n = 29 on theta
    turns less than four times (3.41), from 35 on less than once (0.9966)."""
    theta = 500000.0 ** (-N / HALF)
    got = scaled("llama3", theta, 500000.0, factor=8.0, original_length=8192)
    close(got[:29], theta[:29])
    close(got[35:], theta[35:] / 8)
    turns = 8192 * 500000.0 ** (-29 / 64) / (2 * math.pi)
    assert turns == pytest.approx(3.41, abs=0.005)
    kept = (turns - 1) / 3
    close(got[29], theta[29] * (kept + (1 - kept) / 8))
    assert got[34] > theta[34] / 8


@pytest.mark.parametrize("name", ["softmax", "sliding", "forgetting"])
def test_layers_take_a_scaling(name: str) -> None:
    fields: Any = {"dim": 16, "heads": 2, "rotary": 100.0}
    plain = build(name, **fields)
    layer = build(name, **fields, rotary_scaling={"name": "linear", "factor": 2.0})
    layer.load_state_dict(plain.state_dict())
    assert build(layer.spec(), dim=16).config == layer.config
    x = torch.randn(1, 9, 16)
    assert (layer(x)[0] - plain(x)[0]).abs().max() > 1e-6
    neutral = build(name, **fields, rotary_scaling={"name": "llama3", **LLAMA, "factor": 1})
    neutral.load_state_dict(plain.state_dict())
    torch.testing.assert_close(neutral(x)[0], plain(x)[0], rtol=0, atol=0)


LLAMA = {"factor": 8.0, "original_length": 64}


@pytest.mark.parametrize(
    "scaling, fault",
    [
        ({"factor": 2.0}, "unknown name 'None'; known: linear, llama3, ntk, yarn"),
        ({"name": "yarm", "factor": 2.0}, "unknown name 'yarm'; did you mean 'yarn'?"),
        ({"name": "linear"}, "factor: missing, and it has no default"),
        ({"name": "linear", "factor": 0.5}, "factor: must be at least 1, got 0.5"),
        ({"name": "linear", "factor": "2"}, "factor: expected float, got '2'"),
        ({"name": "linear", "factors": 2}, "unknown field 'factors'; did you mean 'factor'?"),
        ({"name": "yarn", "factor": 2.0}, "original_length: missing, and it has no default"),
        ({"name": "yarn", **LLAMA, "fast": 1}, "fast: must be more than slow, 1.0, got 1"),
        ({"name": "yarn", **LLAMA, "attention": 0}, "attention: must be positive, got 0"),
        ({"name": "llama3", **LLAMA, "low": 4}, "high: must be more than low, 4, got 4.0"),
        ({"name": "llama3", **LLAMA, "original_length": 0}, "original_length: must be positive"),
    ],
)
def test_impossible_scalings(scaling: dict[str, Any], fault: str) -> None:
    with pytest.raises(SpecError) as error:
        build("softmax", dim=16, heads=2, rotary_scaling=scaling)
    assert str(error.value).startswith(f"softmax: rotary_scaling: {fault}")


def test_a_scaling_needs_positions() -> None:
    scaling = {"name": "ntk", "factor": 2.0}
    with pytest.raises(SpecError, match="rotary_scaling: needs a rotary base above 1 to scale"):
        build("softmax", dim=16, rotary=None, rotary_scaling=scaling)
    with pytest.raises(SpecError, match="rotary_scaling: ntk needs at least 4 rotated channels"):
        build("softmax", dim=16, key_dim=2, rotary_scaling=scaling)
