"""The inner objectives: how far M(k) = y is from v, `[..., V]` -> `[...]`, a sum over V."""

from __future__ import annotations

import torch
from torch import Tensor

from layerzoo.spec import SpecError

from .options import Option


class Objective(Option):
    """A new objective is one function, `loss`. Its derivative is autograd's, or `error`, written
    out, where that is faster. order: with which power of a large error that grows."""

    @property
    def order(self) -> float:
        return 1.0

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        """dL/dy, differentiable again."""
        grad = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = y if y.requires_grad else y.detach().requires_grad_()
            (error,) = torch.autograd.grad(self.loss(leaf, v).sum(), leaf, create_graph=grad)
        return error


class Dot(Objective, name="dot"):
    """L = -<y, v>: every write adds, nothing is corrected (LaCT)."""

    @property
    def order(self) -> float:
        return 0.0

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        return -(y * v).sum(-1)

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        return -v


class L2(Objective, name="l2"):
    """L = |y - v|^2 / 2. (Titans leaves out the half: its rates are half of ours.)"""

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (y - v).square().sum(-1)

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        return y - v


class Huber(Objective, name="huber"):
    """L = sum of e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2), e = y - v."""

    delta: float = 1.0
    """Errors beyond this size count linearly."""

    @property
    def order(self) -> float:
        return 0.0

    def check(self) -> None:
        if self.delta <= 0:
            raise SpecError(f"delta: must be positive, got {self.delta}")

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        e = y - v
        near = e.clamp(-self.delta, self.delta)
        return (near * (e - near / 2)).sum(-1)

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        return (y - v).clamp(-self.delta, self.delta)


class Lp(Objective, name="lp"):
    """L = sum of |y - v|^p, p >= 2 (below, the second derivative at zero error is infinite)."""

    p: float = 3.0
    """The error is raised to this power, 2 or more."""

    @property
    def order(self) -> float:
        return self.p - 1

    def check(self) -> None:
        if self.p < 2:
            raise SpecError(
                f"p: must be at least 2, got {self.p}: below, the second derivative of the loss, "
                f"through which the layer learns, is infinite at zero error; use huber"
            )

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        return (y - v).abs().pow(self.p).sum(-1)

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        e = y - v
        return self.p * e.sign() * e.abs().pow(self.p - 1)
