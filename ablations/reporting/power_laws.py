"""Scaling laws that can be fitted: their logs, gradients and starts, and the fit.

All is in centred logs, u = log x - mean log x and v = log y - mean log y, so that starts, bounds
and the optimiser's steps do not depend on units.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

Array = NDArray[np.float64]

HUBER_DELTA = 1e-3
"""The residual at which Huber's loss turns from quadratic to linear."""
EXPONENT_BOUNDS = (0.0, 4.0)
"""Bounds of an exponent."""
TERM_BOUNDS = (-12.0, 12.0)
"""Bounds of the log of a term's share of y at the centre; one of e^-12 stands for no term."""
BEND_BOUNDS = (-20.0, 20.0)
"""Bounds of the log of c x at the centre."""
START_EXPONENTS = (0.1, 0.25, 0.5, 1.0, 2.0)
START_FLOORS = (0.05, 0.3, 0.6, 0.9)
"""Of the grid of starts: exponents, and shares of E in y at the centre."""
OPTIMISER_OPTIONS = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 2000, "maxfun": 5000}


class LogMeans(NamedTuple):
    """The means of log x, by variable, and of log y."""

    centre: Array
    level: float


class PowerLaw(Protocol):
    """log y = f(u; theta). exponents: their places in theta."""

    name: str
    formula: str
    names: tuple[str, ...]
    exponents: tuple[int, ...]
    bounds: tuple[tuple[float, float], ...]

    def value(self, theta: Array, u: Array) -> tuple[Array, Array]:
        """f [m] and its gradient [parameters, m] at u [m, variables]."""
        ...

    def starts(self) -> list[Array]:
        """A grid over theta that suits any centred data."""
        ...

    def parameters(self, theta: Array, frame: LogMeans) -> Array:
        """The formula's parameters, for theta [..., parameters]."""
        ...


class PowerSum:
    """y = (E +) A x^-a, or (E +) A x1^-a + B x2^-b: the log-sum-exp of the logs of its terms.

    theta = (log A, a(, log B, b)(, log E)), the terms' logs at the centre.

    Of one variable, M1 and with E M2 of Alabdulmohsin et al. 2022 (arXiv 2209.06640); of two, with
    E, eq. 2 of Hoffmann et al. 2022 (arXiv 2203.15556).
    """

    def __init__(self, variables: int, floor: bool) -> None:
        names = ("A", "a", "B", "b")[: 2 * variables]
        self.variables, self.floor = variables, floor
        self.name = "floor" if floor else "no floor"
        self.formula = "E + " * floor + ("A x^-a" if variables == 1 else "A x1^-a + B x2^-b")
        self.names: tuple[str, ...] = (*names, "E") if floor else names
        self.exponents: tuple[int, ...] = (1, 3)[:variables]
        self.bounds = (TERM_BOUNDS, EXPONENT_BOUNDS) * variables + (TERM_BOUNDS,) * floor

    def value(self, theta: Array, u: Array) -> tuple[Array, Array]:
        n = 2 * self.variables
        terms = np.empty((self.variables + self.floor, len(u)))
        terms[: self.variables] = theta[0:n:2, None] - theta[1:n:2, None] * u.T
        terms[self.variables :] = theta[n:, None]
        top = terms.max(0)
        shares = np.exp(terms - top)
        total = shares.sum(0)
        shares /= total
        gradient = np.empty((len(theta), len(u)))
        gradient[0:n:2] = shares[: self.variables]
        gradient[1:n:2] = -shares[: self.variables] * u.T
        gradient[n:] = shares[self.variables :]
        return top + np.log(total), gradient

    def starts(self) -> list[Array]:
        """Exponents times the terms' shares of y at the centre, where v is about 0."""
        firsts = (1.0,) if self.variables == 1 else (0.25, 0.5, 0.75)
        exponents = product(START_EXPONENTS, repeat=self.variables)
        grid = []
        for floor, first, slopes in product(
            START_FLOORS if self.floor else (0.0,), firsts, exponents
        ):
            shares = ((1 - floor) * first, (1 - floor) * (1 - first))[: self.variables]
            theta = [x for s, a in zip(shares, slopes, strict=True) for x in (np.log(s), a)]
            grid.append(np.array([*theta, np.log(floor)] if self.floor else theta))
        return grid

    def parameters(self, theta: Array, frame: LogMeans) -> Array:
        n, out = 2 * self.variables, theta.copy()
        out[..., 0:n:2] = np.exp(
            theta[..., 0:n:2] + theta[..., 1:n:2] * frame.centre + frame.level
        )
        out[..., n:] = np.exp(theta[..., n:] + frame.level)
        return out


class SaturatingPower:
    """y = A (1/x + c)^a, of one variable: beyond x = 1/c it nears its limit A c^a as 1/x does.

    A floor is neared as x^-a is. theta = (log A, a, log c). M3 of Alabdulmohsin et al. 2022, whose
    published code has no E in it either.
    """

    name = "saturating"
    formula = "A (1/x + c)^a"
    names: tuple[str, ...] = ("A", "a", "c")
    exponents: tuple[int, ...] = (1,)
    bounds: tuple[tuple[float, float], ...] = (TERM_BOUNDS, EXPONENT_BOUNDS, BEND_BOUNDS)

    def value(self, theta: Array, u: Array) -> tuple[Array, Array]:
        log_a, a, log_c = theta
        inner = np.logaddexp(-u[:, 0], log_c)
        gradient = np.ones((3, len(u)))
        gradient[1] = inner
        gradient[2] = a * np.exp(log_c - inner)
        return log_a + a * inner, gradient

    def starts(self) -> list[Array]:
        bends = (-6.0, -4.0, -2.0, 0.0, 2.0)
        return [
            np.array([-a * np.logaddexp(0, c), a, c]) for a, c in product(START_EXPONENTS, bends)
        ]

    def parameters(self, theta: Array, frame: LogMeans) -> Array:
        log_a, a, log_c = np.moveaxis(theta, -1, 0)
        (centre,) = frame.centre
        A, c = np.exp(log_a + a * centre + frame.level), np.exp(log_c - centre)
        return np.stack([A, a, c], axis=-1)


def huber_loss(
    theta: Array, law: PowerLaw, u: Array, v: Array, weights: Array
) -> tuple[float, Array]:
    """Sum of weights times Huber's loss of f(u) - v, and its gradient [parameters]."""
    value, gradient = law.value(theta, u)
    residual = value - v
    clipped = np.minimum(np.maximum(residual, -HUBER_DELTA), HUBER_DELTA)
    pull = weights * clipped
    return float(pull @ (residual - clipped / 2)), gradient @ pull


def best_starts(law: PowerLaw, u: Array, v: Array, count: int) -> list[Array]:
    """The points of the law's grid with the smallest loss."""
    ones = np.ones_like(v)
    return sorted(law.starts(), key=lambda theta: huber_loss(theta, law, u, v, ones)[0])[:count]


def one_thread() -> AbstractContextManager[Any]:
    """BLAS has one thread inside.

    The optimiser's matrices are so small that handing them to threads takes most of a fit's time.
    """
    return _pools().limit(limits=1, user_api="blas")


@cache
def _pools() -> ThreadpoolController:
    """The libraries of BLAS that are loaded; finding them takes longer than a fit."""
    return ThreadpoolController()


def minimise_loss(
    law: PowerLaw, u: Array, v: Array, weights: Array, starts: Iterable[Array]
) -> tuple[Array, float]:
    """The best end of L-BFGS from these starts, and its loss.

    Hoffmann et al. (approach 3) fit so. Besiroglu et al. 2024 (arXiv 2404.10102) warn that the
    mean of losses this small meets an optimiser's usual tolerances before it has converged: so
    this is their sum, and the tolerances are tight.
    """
    problem = (law, u, v, weights)
    with one_thread():
        ends = [
            minimize(
                huber_loss,
                start,
                problem,
                "L-BFGS-B",
                jac=True,
                bounds=law.bounds,
                options=OPTIMISER_OPTIONS,
            )
            for start in starts
        ]
    best = min(ends, key=lambda end: end.fun)
    return best.x, float(best.fun)
