"""The inner networks: a token's key or query `[N, n, K]` -> `[N, n, V]`, N = batch x heads.

A network meets its fast weights only through `times(m, x)`, x times matrix m: so one definition
serves the writes at the anchor, the reads with every token's own weights, and the specification.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.spec import SpecError

from .activations import GELU, GELU_TANH, SILU
from .options import Option

if TYPE_CHECKING:
    from jaxtyping import Float

Multiply = Callable[[int, Tensor], Tensor]
Backward = Callable[[Tensor, Multiply], list[Tensor]]
"""From dL/dy, and `times_transposed(m, e)`, e times the transpose of matrix m, to dL/d(output of
matrix m) for every m."""

EPS = 1e-6


class Network(Option):
    """Fields of all networks, M(x) = [x +] [LayerNorm] f(x)."""

    bias: bool = False
    """If true, every matrix has a bias, as a last row that meets a constant 1."""
    residual: bool = False
    """If true, x is added. It needs K = V."""
    layer_norm: bool = False
    """If true, the output is normalised, with a weight and a bias per head that are learned
    outside and not by the writes; epsilon is 1e-6."""

    first: ClassVar[tuple[int, ...]] = (0,)
    """The matrices that x itself meets."""

    @property
    def last(self) -> int:
        """The matrix whose output is f(x)."""
        return 0

    def shapes(self, K: int, V: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of every matrix, without the bias row."""
        raise NotImplementedError

    def body(self, times: Multiply, x: Tensor) -> tuple[Tensor, Backward]:
        """f(x), and how an error at f(x) reaches the matrices."""
        raise NotImplementedError

    def forward(
        self, times: Multiply, x: Float[Tensor, "N n K"], layer_norm: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "N n V"], Backward]:
        """M(x), and how dL/dM(x) reaches the matrices; layer_norm: (weight, bias), `[N, 1, V]`."""
        f, backward = self.body(times, x)
        if layer_norm is None:
            return (x + f if self.residual else f), backward
        weight, bias = layer_norm
        normal, mean, rstd = torch.native_layer_norm(f, f.shape[-1:], None, None, EPS)
        y = normal * weight + bias

        def through_norm(dy: Tensor, times_transposed: Multiply) -> list[Tensor]:
            given = (dy * weight, f, f.shape[-1:], mean, rstd, None, None, [True, False, False])
            return backward(torch.ops.aten.native_layer_norm_backward(*given)[0], times_transposed)

        return (x + y if self.residual else y), through_norm


class LinearNetwork(Network, name="linear"):
    """f(x) = x W0."""

    def shapes(self, K: int, V: int) -> list[tuple[int, int]]:
        return [(K, V)]

    def body(self, times: Multiply, x: Tensor) -> tuple[Tensor, Backward]:
        return times(0, x), lambda e, times_transposed: [e]


class MLP(Network, name="mlp"):
    """f(x) = gelu(.. gelu(x W0) W1 ..) W_(depth-1)."""

    depth: int = 2
    """There are this many matrices, 2 to 4."""
    expansion: float = 4.0
    """The hidden layers have this width, as a multiple of K."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """gelu is exact (erf); gelu_tanh is its approximation by tanh."""

    @property
    def last(self) -> int:
        return self.depth - 1

    def check(self) -> None:
        if not 2 <= self.depth <= 4:
            raise SpecError(f"depth: must be 2, 3 or 4, got {self.depth}; depth 1 is 'linear'")
        if self.expansion <= 0:
            raise SpecError(f"expansion: must be positive, got {self.expansion}")

    def shapes(self, K: int, V: int) -> list[tuple[int, int]]:
        widths = [K, *[max(1, round(self.expansion * K))] * (self.depth - 1), V]
        return list(itertools.pairwise(widths))

    def body(self, times: Multiply, x: Tensor) -> tuple[Tensor, Backward]:
        act = GELU if self.activation == "gelu" else GELU_TANH
        hidden = [times(0, x)]
        for m in range(1, self.depth):
            hidden.append(times(m, act.f(hidden[-1])))

        def backward(e: Tensor, times_transposed: Multiply) -> list[Tensor]:
            errors = [e]
            for m in range(self.depth - 1, 0, -1):
                errors.append(act.times_derivative(times_transposed(m, errors[-1]), hidden[m - 1]))
            return errors[::-1]

        return hidden[-1], backward


class GLU(Network, name="glu"):
    """f(x) = (silu(x W0) * (x W2)) W1, numbered as in LaCT."""

    expansion: float = 2.0
    """The hidden layer has this width, as a multiple of K."""
    first: ClassVar[tuple[int, ...]] = (0, 2)

    @property
    def last(self) -> int:
        return 1

    def check(self) -> None:
        if self.expansion <= 0:
            raise SpecError(f"expansion: must be positive, got {self.expansion}")

    def shapes(self, K: int, V: int) -> list[tuple[int, int]]:
        hidden = max(1, round(self.expansion * K))
        return [(K, hidden), (hidden, V), (K, hidden)]

    def body(self, times: Multiply, x: Tensor) -> tuple[Tensor, Backward]:
        gate, up = times(0, x), times(2, x)
        open_ = SILU.f(gate)

        def backward(e: Tensor, times_transposed: Multiply) -> list[Tensor]:
            d = times_transposed(1, e)
            return [SILU.times_derivative(d * up, gate), e, d * open_]

        return times(1, open_ * up), backward


def with_bias(network: Network, x: Tensor) -> Tensor:
    """x with a last column of ones, where the network has biases."""
    return F.pad(x, (0, 1), value=1.0) if network.bias else x
