"""The kernels of linear attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo.ops import ImplError
from layerzoo.kernels import launch, linear
from layerzoo.memories.linear import OP, linear_attention

GPU = torch.cuda.is_available()
WIDE = ("g", "state")
DECAYS = ("none", "constant", "scalar")
# B, T, H, K, V: one token; below a chunk; exactly chunks of 32 and 64; chunks and a rest; T split
SHAPES = [(2, 1, 2, 4, 4), (1, 7, 2, 16, 3), (2, 64, 1, 5, 33), (1, 83, 2, 64, 64)]
SHAPES += [(1, 300, 1, 16, 16), (2, 270, 1, 20, 16)]
if GPU:
    SHAPES += [(2, 64, 2, 64, 64), (2, 200, 3, 128, 128), (1, 300, 2, 64, 128)]
    SHAPES += [(1, 300, 2, 128, 64), (1, 150, 2, 256, 256)]


def tensors(
    shape: tuple[int, ...], decay: str, strength: str = "mild", state: bool = True
) -> dict[str, Tensor]:
    B, T, H, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    found = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    if state:
        found["state"] = normal(B, H, K, V)
    size = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[decay]
    if size:
        g = -torch.rand(size, generator=generator, dtype=torch.float64)
        factor = {"mild": 0.05, "strong": 20.0, "resets": 0.05}[strength]
        found["g"] = factor * g
        if strength == "resets":
            found["g"][torch.rand(size, generator=generator) < 0.1] = -30.0
    return found


def call(scale: float = 0.3) -> Callable[..., Any]:
    def run(impl: str, q: Tensor, k: Tensor, v: Tensor, g: Any = None, state: Any = None) -> Any:
        return linear_attention(q, k, v, g, scale=scale, state=state, impl=impl)

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("decay", DECAYS)
def test_equals_recurrent(judge: Any, shape: tuple[int, ...], decay: str) -> None:
    judge(OP, call(), tensors(shape, decay), wide=WIDE)


@pytest.mark.parametrize("strength", ["strong", "resets"])
@pytest.mark.parametrize("decay", ["constant", "scalar"])
def test_strong_decays(judge: Any, decay: str, strength: str) -> None:
    judge(OP, call(), tensors((1, 290, 4, 16, 16), decay, strength), wide=WIDE)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_a_state(judge: Any, decay: str) -> None:
    judge(OP, call(), tensors((1, 70, 2, 16, 16), decay, state=False), wide=WIDE)
