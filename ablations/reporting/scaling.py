"""How a metric scales: fitted laws with intervals, misses at held-out sizes, and refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cells.report_options import ScalingLaw
from .power_laws import (
    EXPONENT_BOUNDS,
    Array,
    LogMeans,
    PowerLaw,
    PowerSum,
    SaturatingPower,
    best_starts,
    minimise_loss,
)
from .results import CellResult, GridResults
from .statistics import draw_resamples

LEAST_DECADES = 1.5
"""The least range of x that an exponent is reported from."""
START_COUNT = 8
"""From so many points of a law's grid a fit starts; in a resample from its own end and one."""
INTERVAL_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, eq=False)
class FittedForm:
    """A law, fitted to all that was measured.

    parameters: value and 95% bootstrap interval; none if the scaling is refused.
    objective: the sum of Huber's loss over the logs.
    miss: exp(mean |log predicted - log measured|) - 1 at the held-out sizes, of a fit to the rest.
    """

    name: str
    formula: str
    parameters: dict[str, tuple[float, float, float]]
    objective: float
    miss: float
    law: PowerLaw = field(repr=False)
    frame: LogMeans = field(repr=False)
    theta: Array = field(repr=False)
    draws: Array = field(repr=False)
    rises: bool = field(repr=False)

    def predict(self, x: ArrayLike) -> Array:
        """y at x [m] or [m, variables]."""
        return self._curve(self.theta, x)

    def band(self, x: ArrayLike) -> tuple[Array, Array]:
        """The ends of the 95% bootstrap interval of y at each x."""
        low, high = np.percentile(
            [self._curve(draw, x) for draw in self.draws], INTERVAL_PERCENTILES, axis=0
        )
        return low, high

    def _curve(self, theta: Array, x: ArrayLike) -> Array:
        log_y = self.law.value(theta, np.log(_columns(x)) - self.frame.centre)[0]
        log_y = log_y + self.frame.level
        with np.errstate(over="ignore"):  # a resample may lead anywhere
            return np.exp(-log_y if self.rises else log_y)


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """What was fitted. refused: why no exponent is reported. decades: the range of each variable
    (nan if it is not positive). forms: by name; none if there was nothing to fit."""

    refused: str | None
    decades: tuple[float, ...]
    forms: dict[str, FittedForm]
    rises: bool

    @property
    def best(self) -> FittedForm:
        """The form with the smallest miss; if several agree to 0.1%, the one with fewest
        parameters."""
        return min(self.forms.values(), key=lambda form: (round(form.miss, 3), len(form.theta)))


def fit_scaling(
    x: ArrayLike,
    y: ArrayLike,
    configuration: Sequence[str],
    *,
    rises: bool = False,
    resamples: int = 200,
    seed: int = 0,
) -> ScalingFit:
    """Fit y(x) with a power law, one with a floor, and (of one variable) one that saturates.

    x: sizes [m] or [m, 2]. y: what was measured [m]. configuration: which one each is of; the
    seeds of one share it. rises: y grows with x, as a capacity does: then 1/y is fitted, so
    that a floor E is a limit 1/E of y. resamples, seed: of the bootstrap, which draws whole
    configurations with their seeds; a draw of fewer than a form has parameters is drawn again.

    Each form is also fitted without the configurations that are the largest in a variable, and
    misses these by `Form.miss`.

    No exponent is reported (`refused`)
    - unless all x and y are positive and finite;
    - from an x that spans less than 1.5 decades;
    - from fewer different configurations than parameters + 2, or, beside those held out, than
      parameters;
    - if, in the best form, the interval of an exponent reaches the ends of what is
      searched (0 and 4), or is wider than the exponent itself.
    """
    x, y = _columns(x), np.asarray(y, dtype=np.float64)
    variables = x.shape[1]
    laws: list[PowerLaw] = [PowerSum(variables, floor=False), PowerSum(variables, floor=True)]
    if variables == 1:
        laws.append(SaturatingPower())
    parameters = max(len(law.names) for law in laws)
    if bad := int((~_positive(y)).sum() + (~_positive(x)).sum()):
        reason = f"{bad} of {x.size + y.size} values of x and y are not positive and finite"
        return ScalingFit(reason, (np.nan,) * variables, {}, rises)
    decades = tuple(np.ptp(np.log10(x), axis=0).tolist())
    held_out = (x == x.max(0)).any(1)
    names, which = np.unique(np.asarray(configuration), return_inverse=True)
    if reason := _too_little(x, held_out, decades, len(names), parameters):
        return ScalingFit(reason, decades, {}, rises)
    rng = np.random.default_rng(seed)
    weights = draw_resamples(len(names), parameters, resamples, rng)[:, which]
    log_y = -np.log(y) if rises else np.log(y)
    forms = {law.name: _fit_form(law, np.log(x), log_y, held_out, weights, rises) for law in laws}
    reason = _undetermined(ScalingFit(None, decades, forms, rises).best)
    if reason:
        forms = {name: replace(form, parameters={}) for name, form in forms.items()}
    return ScalingFit(reason, decades, forms, rises)


def _columns(x: ArrayLike) -> Array:
    x = np.asarray(x, dtype=np.float64)
    return x[:, None] if x.ndim == 1 else x


def _positive(values: Array) -> np.ndarray:
    return np.isfinite(values) & (values > 0)


def _too_little(
    x: Array, held_out: np.ndarray, decades: Sequence[float], configurations: int, parameters: int
) -> str | None:
    """Why this cannot be fitted."""
    for name, span in zip(("x",) if len(decades) == 1 else ("x1", "x2"), decades, strict=True):
        if span < LEAST_DECADES:
            return f"{name} spans {span:.2f} decades; an exponent takes {LEAST_DECADES}"
    sizes = min(configurations, len(np.unique(x, axis=0)))
    if sizes < parameters + 2:
        return f"{parameters} parameters take {parameters + 2} different sizes; there are {sizes}"
    rest = len(np.unique(x[~held_out], axis=0))
    if rest < parameters:
        return f"{parameters} parameters take as many sizes beside the largest; there are {rest}"
    return None


def _undetermined(form: FittedForm) -> str | None:
    """Why the form's exponents are not to be reported."""
    least, most = EXPONENT_BOUNDS
    for place in form.law.exponents:
        name = form.law.names[place]
        value, low, high = form.parameters[name]
        found = f"{form.name}: {name} = {value:.3g}, its 95% interval, {low:.3g} to {high:.3g},"
        if low < least + 1e-6 or high > most - 1e-6:
            return f"{found} reaches the end of what is searched, {least:g} to {most:g}"
        if high - low > value:
            return f"{found} is wider than {name} itself"
    return None


def _fit_form(
    law: PowerLaw, log_x: Array, log_y: Array, held_out: np.ndarray, weights: Array, rises: bool
) -> FittedForm:
    """Fit to the sizes that are not held out, for the miss; to all; and to each resample."""
    frame = LogMeans(log_x.mean(0), float(log_y.mean()))
    u, v = log_x - frame.centre, log_y - frame.level
    rest = u[~held_out], v[~held_out]
    theta, _ = minimise_loss(
        law, *rest, np.ones_like(rest[1]), best_starts(law, *rest, START_COUNT)
    )
    miss = np.expm1(np.abs(law.value(theta, u[held_out])[0] - v[held_out]).mean())

    starts = best_starts(law, u, v, START_COUNT)
    theta, objective = minimise_loss(law, u, v, np.ones_like(v), starts)
    draws = np.array([minimise_loss(law, u, v, row, [theta, starts[0]])[0] for row in weights])
    low, high = np.percentile(law.parameters(draws, frame), INTERVAL_PERCENTILES, axis=0)
    triples = np.stack([law.parameters(theta, frame), low, high], axis=1).tolist()
    return FittedForm(
        name=law.name,
        formula=f"{'1/y' if rises else 'y'} = {law.formula}",
        parameters={name: (a, b, c) for name, (a, b, c) in zip(law.names, triples, strict=True)},
        objective=objective,
        miss=float(miss),
        law=law,
        frame=frame,
        theta=theta,
        draws=draws,
        rises=rises,
    )


@dataclass(frozen=True)
class FittedLaw:
    """A law of one group of arms.

    group: its options. cells: what is fitted. x [m, variables], y [m]: of these cells.
    left_out: how many finished cells say nothing of y, and why, in words.
    scaling: None if there is no cell to fit.
    """

    law: ScalingLaw
    group: str
    cells: list[CellResult]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    left_out: dict[str, int]
    scaling: ScalingFit | None


def fit_laws(results: GridResults) -> list[FittedLaw]:
    """Every law of every group. Seeds of an arm are one configuration of the fit."""
    out = []
    for law in results.report.scaling:
        groups: dict[str, list[CellResult]] = {}
        for cell in results.cells:
            options = [cell.options[axis] for axis in law.by if axis in cell.options]
            groups.setdefault(",".join(options), []).append(cell)
        out += [_fit_group(law, group, cells) for group, cells in groups.items()]
    return out


def _fit_group(law: ScalingLaw, group: str, cells: Sequence[CellResult]) -> FittedLaw:
    used: list[CellResult] = []
    left_out: dict[str, int] = {}
    for cell in (cell for cell in cells if cell.metrics):
        if fault := _why_left_out(law, cell):
            left_out[fault] = left_out.get(fault, 0) + 1
        else:
            used.append(cell)
    x = np.array([[cell.metrics[name] for name in law.x] for cell in used], dtype=np.float64)
    y = np.array([cell.metrics[law.y] for cell in used], dtype=np.float64)
    scaling = None
    if used:
        arms = [cell.arm for cell in used]
        scaling = fit_scaling(x[:, 0] if len(law.x) == 1 else x, y, arms, rises=law.rises)
    return FittedLaw(law, group, used, x, y, left_out, scaling)


def _why_left_out(law: ScalingLaw, cell: CellResult) -> str | None:
    """Why a finished cell says nothing of the law."""
    missing = [name for name in (law.y, *law.x) if cell.metrics.get(name) is None]
    if missing:
        return f"no {missing[0]}"
    y = cell.metrics[law.y]
    if not math.isfinite(y) or y <= 0:
        return f"{law.y} is below the smallest that was tested" if y == 0 else f"{law.y} is {y}"
    if law.y.startswith("capacity/") and y == _largest_tested(cell):
        return f"{law.y} is the largest that was tested, or more"
    return None


def _largest_tested(cell: CellResult) -> int | None:
    tested = [re.fullmatch(r"accuracy_pairs/(\d+)", name) for name in cell.metrics]
    return max((int(found[1]) for found in tested if found), default=None)
