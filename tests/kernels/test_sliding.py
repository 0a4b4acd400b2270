"""The kernels of sliding_attention against the op's other implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo.attention.sliding import OP, cached_sinks, sliding_attention
from layerzoo.kernels import launch, sliding
from layerzoo.ops import ImplError

GPU = torch.cuda.is_available()
D = 64 if GPU else 16


def cached(start: int, window: int, sinks: int) -> int:
    return cached_sinks(start, window, sinks) + min(window - 1, start)


def tensors(
    B: int = 1, T: int = 8, H: int = 2, G: int | None = None, K: int = D, V: int = D, past: int = 0
) -> dict[str, Tensor]:
    """float64 q, k, v, with `past` more tokens in k and v."""
    generator = torch.Generator().manual_seed(B + T + H + K)
    G = H if G is None else G
    shapes = {"q": (B, T, H, K), "k": (B, past + T, G, K), "v": (B, past + T, G, V)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def attend(window: int, sinks: int = 0, start: int = 0, scale: float = 0.3) -> Callable[..., Any]:
    def call(impl: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OP(impl, q, k, v, window=window, sinks=sinks, start=start, scale=scale)

    return call


L = 300 if GPU else 150
CASES = {
    "window": ({"T": L}, {"window": 70}),
    "inner blocks": ({"T": 2 * L, "H": 1}, {"window": 200}),
    "window of one": ({"T": 40}, {"window": 1}),
    "narrow window": ({"T": L, "H": 1}, {"window": 5}),
    "longer than the sequence": ({"T": 90, "H": 1}, {"window": 1000}),
    "sinks": ({"T": L, "H": 1}, {"window": 33, "sinks": 4}),
    "many sinks": ({"T": L, "H": 1}, {"window": 20, "sinks": 90}),
    "more sinks than tokens": ({"T": 30, "H": 1}, {"window": 4, "sinks": 40}),
    "sinks apart": ({"T": 70, "H": 1}, {"window": 40, "sinks": 5, "start": 300}),
    "sinks leave the window": ({"T": 70, "H": 1}, {"window": 40, "sinks": 9, "start": 43}),
    "sinks in the window": ({"T": 70, "H": 1}, {"window": 80, "sinks": 9, "start": 20}),
    "start without sinks": ({"T": 50, "H": 1}, {"window": 30, "start": 100}),
    "grouped heads": ({"T": 90, "H": 6, "G": 2, "B": 2}, {"window": 40, "sinks": 3}),
    "odd channels": ({"T": 50, "H": 2, "K": 5, "V": 19}, {"window": 20, "sinks": 2}),
    "narrow values": ({"T": 40, "H": 1, "K": 2 * D, "V": 16}, {"window": 20}),
    "negative scale": ({"T": 20, "H": 1}, {"window": 8, "scale": -0.4}),
    "no scale": ({"T": 20, "H": 1}, {"window": 8, "sinks": 2, "scale": 0.0}),
    "decode": ({"T": 1, "B": 2}, {"window": 150, "start": 400}),
    "decode with sinks": ({"T": 1}, {"window": 130, "sinks": 5, "start": 400}),
    "decode, first token": ({"T": 1, "B": 2}, {"window": 9, "sinks": 3}),
    "decode grouped heads": ({"T": 1, "H": 6, "G": 2}, {"window": 90, "sinks": 70, "start": 99}),
    "few tokens": ({"T": 5, "H": 4, "G": 2}, {"window": 70, "sinks": 3, "start": 71}),
    "decode odd channels": ({"T": 2, "K": 5, "V": 19}, {"window": 40, "sinks": 2, "start": 77}),
}
if GPU:
    CASES["wide heads"] = ({"T": L, "K": 128, "V": 128}, {"window": 130, "sinks": 4})
    CASES["widest heads"] = ({"T": L, "K": 256, "V": 256}, {"window": 130, "sinks": 4})
    CASES["decode wide heads"] = ({"T": 1, "K": 128, "V": 128}, {"window": 130, "start": 400})


@pytest.mark.parametrize("name", CASES)
def test_against_the_other_implementations(name: str, judge: Callable[..., None]) -> None:
    shape, options = CASES[name]
    start, sinks = options.get("start", 0), options.get("sinks", 0)
    past = cached(start, options["window"], sinks)
    judge(OP, attend(**options), tensors(**shape, past=past))
