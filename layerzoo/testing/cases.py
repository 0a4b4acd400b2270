"""The cases of a layer: its small specs, with every implementation, and inputs to run them on.

Everything is float64 unless a law says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerzoo.layer import Layer
from layerzoo.ops import ImplError
from layerzoo.registry import build, get_layer

DIM = 24
SHORT, LONG = 20, 70
"""Tokens of a sequence. The long one is two chunks of the zoo's closed forms, and a rest."""
NOISE = 0.05
EXACT, SMALL, ROUNDED = 0.0, 1e-12, 1e-9
"""Tolerances in float64: equal to the bit, the same sums in the same order, other sums."""


class LayerCase(NamedTuple):
    """A spec of `Layer.cases`, by its index, and an implementation."""

    name: str
    n: int
    impl: str

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def spec(self) -> dict[str, Any]:
        return get_layer(self.name).cases[self.n]

    @property
    def told(self) -> str:
        """The case in words."""
        fields = ", ".join(f"{name}: {value}" for name, value in self.spec.items())
        return f"{{{fields}}} of dim {DIM}, impl {self.impl}"

    @property
    def device(self) -> str:
        return "cuda" if self.impl == "triton" else "cpu"

    @property
    def op(self) -> str:
        """The name of the layer's op; of a layer without one, its own."""
        op = get_layer(self.name).op
        return self.name if op is None else op.name

    def build(self, dtype: torch.dtype = torch.float64, draw: int = 1) -> Layer:
        """Build the layer, and add noise to every parameter: zeros and ones would hide a missing
        factor."""
        torch.manual_seed(draw)
        layer = build(self.name, dim=DIM, **self.spec)
        add_noise(layer)
        layer.impl = self.impl
        return layer.to(self.device, dtype)


def add_noise(layer: Layer) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p += NOISE * torch.randn_like(p)


def tokens(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs `[B, T, D]`, the same for the same T."""
    generator = torch.Generator().manual_seed(T)
    return torch.randn(B, T, DIM, generator=generator, dtype=torch.float64).to(dtype)


def is_wide(case: LayerCase) -> bool:
    """Whether it runs in float64, which a kernel may refuse."""
    return case.impl != "triton"


def in_pieces(layer: Layer, x: Tensor, sizes: list[int], state: Any = None) -> dict[str, Any]:
    """Run x in pieces of these sizes -> {output, state}."""
    outputs = []
    for piece in x.split(sizes, 1):
        y, state = layer(piece, state)
        outputs.append(y)
    return {"output": torch.cat(outputs, 1), "state": state}


def whole(layer: Layer, x: Tensor, state: Any = None) -> dict[str, Any]:
    """Run x at once -> {output, state}."""
    y, state = layer(x, state)
    return {"output": y, "state": state}


def cases(name: str) -> Iterator[LayerCase]:
    """The cases of a layer, each with every implementation that runs here."""
    for n, spec in enumerate(get_layer(name).cases):
        layer = build(name, dim=DIM, **spec)
        yield from (LayerCase(name, n, impl) for impl in impls(layer))


def impls(layer: Layer) -> list[str]:
    """The implementations that all ops of a layer have here; auto if it has no op."""
    ops = layer.ops()
    common = [i for i in ("recurrent", "chunked") if ops and all(i in op.impls for op in ops)]
    if ops and torch.cuda.is_available() and _takes_kernels(layer):
        common.append("triton")
    return common or ["auto"]


def _takes_kernels(layer: Layer) -> bool:
    layer = copy.deepcopy(layer).to("cuda")
    layer.impl = "triton"
    try:
        layer(torch.zeros(1, 2, DIM, device="cuda"))
    except ImplError:
        return False
    return True
