"""The forgetting rules: what becomes of old weights, `[N, I, O]`, when new ones are written.

Decay, W = (1 - decay) W, is linear and acts on every token. The others are maps phi(W), which act
between mini-batches only, at one of three places (`Rule.place`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerzoo.spec import SpecError

from .options import Option


class ForgettingRule(Option):
    """has_decay: W = (1 - decay) W + step, with an input-dependent decay. A new rule is one
    function, `phi`. nonlinear: it has one. dual: W is what phi makes of a master copy that adds up
    the writes, which must be kept (`place: view`)."""

    @property
    def has_decay(self) -> bool:
        return False

    @property
    def nonlinear(self) -> bool:
        return type(self).phi is not ForgettingRule.phi

    @property
    def dual(self) -> bool:
        return False

    def phi(self, W: Tensor, W_init: Tensor) -> Tensor:
        """The map of a matrix; W_init are its learned initial weights."""
        return W


class Nothing(ForgettingRule, name="none"):
    """W = W + step."""


class Decay(ForgettingRule, name="decay"):
    """W = (1 - decay) W + step."""

    @property
    def has_decay(self) -> bool:
        return True


class Mapped(ForgettingRule):
    """Rules by a map, which may have a decay as well."""

    decay: bool = False
    """If true, the weights also decay."""

    @property
    def has_decay(self) -> bool:
        return self.decay


class Norm(Mapped, name="norm"):
    """phi(W) = W n / (|W| + eps): every output's weights get back their initial norm n = |W_init|
    over the input dimension. (LaCT has eps 1e-5, AllMem none.)"""

    eps: float = 0.0
    """This is added to the norm by which weights are divided."""

    def check(self) -> None:
        if self.eps < 0:
            raise SpecError(f"eps: must not be negative, got {self.eps}")

    def phi(self, W: Tensor, W_init: Tensor) -> Tensor:
        return W * (W_init.norm(dim=-2, keepdim=True) / (W.norm(dim=-2, keepdim=True) + self.eps))


class Lq(Mapped, name="lq"):
    """phi(A) = A / max(|A|_q, 1)^(q - 2), |A|_q over the whole matrix (Moneta's link function).
    The bound is ours: without it phi grows as 1 / |A|^(q - 3) where A is small."""

    q: float = 4.0
    """The norm raises weights to this power."""

    def check(self) -> None:
        if self.q < 2:
            raise SpecError(f"q: must be at least 2, got {self.q}")

    @property
    def dual(self) -> bool:
        return True

    def phi(self, W: Tensor, W_init: Tensor) -> Tensor:
        power = W.abs().pow(self.q).sum((-2, -1), keepdim=True).clamp(min=1.0)
        return W / power.pow((self.q - 2) / self.q)


class KL(Mapped, name="kl"):
    """phi(A) = softmax(A) over the input dimension: an output's weights are a distribution, A
    its logits (Memora)."""

    @property
    def dual(self) -> bool:
        return True

    def phi(self, W: Tensor, W_init: Tensor) -> Tensor:
        return torch.softmax(W, -2)
