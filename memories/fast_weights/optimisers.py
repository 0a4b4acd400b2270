"""The inner optimisers: from the gradients of a token or a mini-batch to a step."""

from __future__ import annotations

from torch import Tensor

from layerzoo.spec import SpecError

from .options import Option


class Optimiser(Option):
    """has_momentum: S = momentum S - lr g. `direction` maps S of a mini-batch to its step."""

    @property
    def has_momentum(self) -> bool:
        return False

    def direction(self, S: Tensor) -> Tensor:
        return S


class SGD(Optimiser, name="sgd"):
    """The step is -lr g."""


class Momentum(Optimiser, name="momentum"):
    """The step is S = momentum S - lr g, with input-dependent momentum."""

    @property
    def has_momentum(self) -> bool:
        return True


class Muon(Optimiser, name="muon"):
    """The step of a mini-batch with its singular values near 1, by five Newton-Schulz iterations
    (Jordan et al. 2024, with LaCT's coefficients). Needs `update: chunk`.
    """

    momentum: bool = False
    """If true, the step is made of S = momentum S - lr g, and S itself is kept."""
    eps: float = 1e-7
    """This is added to the Frobenius norm by which a step is divided first."""

    def check(self) -> None:
        if self.eps <= 0:
            raise SpecError(f"eps: must be positive, got {self.eps}")

    @property
    def has_momentum(self) -> bool:
        return self.momentum

    def direction(self, S: Tensor) -> Tensor:
        flip = S.shape[-2] > S.shape[-1]
        X = S.mT if flip else S
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + self.eps)
        for a, b, c in NEWTON_SCHULZ:
            A = X @ X.mT
            X = a * X + (b * A + c * (A @ A)) @ X
        return X.mT if flip else X


NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
