"""Scaling fits against surfaces whose laws are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize

from layerzoo.ablations.reporting.power_laws import (
    Array,
    LogMeans,
    PowerLaw,
    PowerSum,
    SaturatingPower,
    best_starts,
    huber_loss,
    minimise_loss,
)
from layerzoo.ablations.reporting.scaling import fit_scaling
from layerzoo.ablations.reporting.statistics import draw_resamples

LAWS = {
    "no floor": PowerSum(1, floor=False),
    "floor": PowerSum(1, floor=True),
    "saturating": SaturatingPower(),
    "no floor, two": PowerSum(2, floor=False),
    "floor, two": PowerSum(2, floor=True),
}
CHINCHILLA = {"A": 406.4, "a": 0.34, "B": 410.7, "b": 0.28, "E": 1.69}
"""Hoffmann et al. 2022, eq. 10."""


def observed(
    x: Array, y: Array, *, noise: float = 0.01, seeds: int = 3, seed: int = 0
) -> tuple[Array, Array, list[str]]:
    """x, y and the configuration of every seed, with log-normal noise."""
    x, y = np.repeat(x, seeds, axis=0), np.repeat(y, seeds)
    rng = np.random.default_rng(seed)
    names = [f"size {n // seeds}" for n in range(len(y))]
    return x, y * np.exp(noise * rng.standard_normal(len(y))), names


SIZES = np.logspace(3, 6, 8)
FALLS = {
    "no floor": 20 * SIZES**-0.4,
    "floor": 0.2 + 20 * SIZES**-0.4,
    "saturating": 20 * (1 / SIZES + 1e-5) ** 0.4,
}


def chinchilla(count: int) -> tuple[Array, Array]:
    """Sizes [count^2, 2], N 1e7..1e10 and D 1e9..1e12, and their losses."""
    n, d = np.meshgrid(np.logspace(7, 10, count), np.logspace(9, 12, count))
    x = np.stack([n.ravel(), d.ravel()], axis=1)
    return x, 1.69 + 406.4 * x[:, 0] ** -0.34 + 410.7 * x[:, 1] ** -0.28


@pytest.mark.parametrize("name", LAWS)
def test_the_gradient_is_the_numerical_one(name: str) -> None:
    law, rng = LAWS[name], np.random.default_rng(1)
    u, v = rng.normal(size=(9, 2 if "two" in name else 1)), rng.normal(size=9)
    v[:4] *= 1e-4  # so that residuals are on both sides of delta
    theta = np.full(len(law.names), 1e-4) if "two" not in name else law.starts()[-1]
    for point in (theta, law.starts()[3]):
        weights = rng.uniform(0, 3, size=9)

        def loss(theta: Array, at: Array = weights) -> float:
            return huber_loss(theta, law, u, v, at)[0]

        _, gradient = huber_loss(point, law, u, v, weights)
        numeric = approx_fprime(point, loss, 1e-8)
        assert gradient == pytest.approx(numeric, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("no floor", (3.0, 0.5)),
        ("floor", (3.0, 0.5, 0.7)),
        ("saturating", (3.0, 0.5, 2e-4)),
        ("floor, two", (*CHINCHILLA.values(),)),
    ],
)
def test_a_law_without_noise_is_found_exactly(name: str, values: tuple[float, ...]) -> None:
    law: PowerLaw = LAWS[name]
    x = chinchilla(4)[0] if "two" in name else SIZES[:, None]
    y = formula(law, dict(zip(law.names, values, strict=True)), x)
    frame = LogMeans(np.log(x).mean(0), float(np.log(y).mean()))
    u, v = np.log(x) - frame.centre, np.log(y) - frame.level
    theta, _ = minimise_loss(law, u, v, np.ones_like(v), best_starts(law, u, v, 8))
    assert law.parameters(theta, frame) == pytest.approx(values, rel=2e-3)


def formula(law: PowerLaw, values: dict[str, Any], x: Array) -> Array:
    """y as the form's text says."""
    terms = law.formula.replace(" x", " * x").replace(" (", " * (").replace("^", "**")
    columns = {"x": x[:, 0], "x1": x[:, 0], "x2": x[:, -1]}
    return eval(terms, {}, {**columns, **values})


def test_no_other_optimiser_goes_lower() -> None:
    x, y, _ = observed(SIZES, FALLS["floor"])
    law, u, v = LAWS["floor"], np.log(x[:, None] / 3e4), np.log(y)
    ones = np.ones_like(v)
    theta, least = minimise_loss(law, u, v, ones, best_starts(law, u, v, 8))
    options = {"xatol": 1e-10, "fatol": 1e-16, "maxiter": 4000}

    def loss(theta: Array) -> float:
        residuals = np.abs(
            np.log(np.exp(theta[2]) + np.exp(theta[0]) * np.exp(-theta[1] * u[:, 0])) - v
        )
        return float(np.where(residuals < 1e-3, residuals**2 / 2, 1e-3 * (residuals - 5e-4)).sum())

    assert loss(theta) == pytest.approx(least)
    for start in (theta, np.array([0.0, 1.0, -1.0])):
        assert minimize(loss, start, method="Nelder-Mead", options=options).fun > least * (
            1 - 1e-6
        )


def test_the_chinchilla_surface_is_recovered() -> None:
    inside = []
    for seed in range(2):
        found = fit_scaling(*observed(*chinchilla(4), seed=seed), resamples=30, seed=seed)
        assert found.refused is None and found.best.name == "floor"
        assert found.decades == pytest.approx((3.0, 3.0))
        for name, truth in CHINCHILLA.items():
            value, low, high = found.best.parameters[name]
            inside.append(low <= truth <= high)
            if name in "abE":
                assert value == pytest.approx(truth, rel=0.15)
    assert len(inside) == 10 and sum(inside) >= 8  # 95% intervals


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    fits = [
        fit_scaling(*observed(SIZES, FALLS["floor"], seed=seed), resamples=20, seed=seed)
        for seed in range(20)
    ]
    intervals = [found.forms["floor"].parameters["a"][1:] for found in fits]
    assert sum(low <= 0.4 <= high for low, high in intervals) >= 16
    assert np.mean([high - low for low, high in intervals]) < 0.1


@pytest.mark.parametrize("truth", FALLS)
def test_held_out_sizes_tell_the_forms_apart(truth: str) -> None:
    found = fit_scaling(*observed(SIZES, FALLS[truth]), resamples=20)
    assert found.best.name == truth
    assert found.best.miss < 0.02
    value, low, high = found.best.parameters["a"]
    assert low <= value <= high and value == pytest.approx(0.4, rel=0.1)
    if truth != "no floor":
        assert found.forms["no floor"].miss > 5 * found.best.miss


def test_the_miss_is_that_of_the_largest_sizes() -> None:
    x, y, names = observed(SIZES, FALLS["no floor"], noise=0.0)
    y[x == x.max()] *= 1.25
    found = fit_scaling(x, y, names, resamples=2)
    assert found.forms["no floor"].miss == pytest.approx(0.25, abs=1e-3)
    grid, loss = chinchilla(4)
    largest = (grid == grid.max(0)).any(1)
    found = fit_scaling(*observed(grid, loss * np.where(largest, 1.25, 1), noise=0.0), resamples=2)
    assert found.forms["floor"].miss == pytest.approx(0.25, abs=2e-3)


def test_a_capacity_rises() -> None:
    x, y, names = observed(SIZES, 0.3 * SIZES**0.5)
    found = fit_scaling(x, y, names, rises=True, resamples=20)
    form = found.best
    assert found.refused is None and found.rises
    assert (form.name, form.formula) == ("no floor", "1/y = A x^-a")
    assert form.parameters["a"][0] == pytest.approx(0.5, abs=0.01)
    assert 1 / form.parameters["A"][0] == pytest.approx(0.3, rel=0.05)
    assert form.predict(x) == pytest.approx(y, rel=0.05)
    limited = fit_scaling(*observed(SIZES, 1 / (0.01 + SIZES**-0.5)), rises=True, resamples=20)
    assert limited.best.name == "floor"
    assert 1 / limited.best.parameters["E"][0] == pytest.approx(100, rel=0.05)
    falls = fit_scaling(x, y, names, resamples=10)
    assert "reaches the end of what is searched, 0 to 4" in (falls.refused or "")


@pytest.mark.parametrize("rises", [False, True])
def test_the_band_holds_the_curve(rises: bool) -> None:
    x, y, names = observed(SIZES, FALLS["floor"] ** (-1 if rises else 1))
    form = fit_scaling(x, y, names, rises=rises, resamples=20).forms["floor"]
    at = np.logspace(3, 7, 20)
    low, high = form.band(at)
    curve = form.predict(at)
    assert (low < curve).all() and (curve < high).all()
    assert (
        np.log(high / low)[-1] > 2 * np.log(high / low)[10]
    )  # it opens where nothing was measured
    expected = formula(form.law, {n: v[0] for n, v in form.parameters.items()}, at[:, None])
    assert curve == pytest.approx(1 / expected if rises else expected)


REFUSALS = [
    ({"x": np.logspace(3, 4, 8)}, "x spans 1.00 decades; an exponent takes 1.5"),
    ({"x": np.logspace(3, 6, 4)}, "3 parameters take 5 different sizes; there are 4"),
    ({"configuration": ["one"] * 24}, "3 parameters take 5 different sizes; there are 1"),
    ({"y": np.r_[0.0, np.ones(23)]}, "1 of 48 values of x and y are not positive and finite"),
    ({"y": np.r_[np.nan, np.inf, np.ones(22)]}, "2 of 48 values"),
    ({"y": observed(SIZES, np.ones(8))[1]}, "reaches the end of what is searched"),
    ({"y": observed(SIZES, FALLS["floor"], noise=0.2)[1]}, "is wider than a itself"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSALS, ids=[r for _, r in REFUSALS])
def test_what_is_refused_has_no_exponent(changes: dict[str, Any], reason: str) -> None:
    sizes = changes.get("x", SIZES)
    x, y, names = observed(sizes, 0.2 + 20 * sizes**-0.4)
    given = {
        "x": x,
        "y": y,
        "configuration": names,
        **{k: v for k, v in changes.items() if k != "x"},
    }
    found = fit_scaling(**given, resamples=20)
    assert reason in (found.refused or "")
    assert all(not form.parameters and form.miss >= 0 for form in found.forms.values())


def test_two_variables_need_range_and_sizes_in_both() -> None:
    x, y = chinchilla(4)
    narrow = fit_scaling(*observed(x ** [1.0, 0.4], y), resamples=5)
    assert narrow.refused == "x2 spans 1.20 decades; an exponent takes 1.5"
    largest = (x == x.max(0)).any(1)
    few = fit_scaling(*observed(x[largest], y[largest]), resamples=5)
    assert few.refused == "5 parameters take as many sizes beside the largest; there are 0"


def test_the_bootstrap_draws_configurations() -> None:
    # Seeds that agree, around a law that their configurations leave: only drawing the
    # configurations shows how uncertain the exponent is.
    def width(configuration: list[str]) -> float:
        found = fit_scaling(x, y, configuration, resamples=20)
        _, low, high = found.forms["no floor"].parameters["a"]
        return high - low

    x, y, names = observed(
        SIZES, observed(SIZES, FALLS["no floor"], seeds=1, noise=0.05)[1], noise=0, seeds=6
    )
    apart = width([f"{name} {n}" for n, name in enumerate(names)])
    assert width(names) > 1.5 * apart


def test_the_bootstrap_repeats() -> None:
    def fitted(seed: int) -> dict[str, tuple[float, float, float]]:
        found = fit_scaling(*observed(SIZES, FALLS["no floor"]), resamples=5, seed=seed)
        assert found.best.parameters
        return found.best.parameters

    assert fitted(0) == fitted(0)
    assert fitted(0)["a"][1:] != fitted(1)["a"][1:]


def test_a_draw_has_as_many_sizes_as_a_form_has_parameters() -> None:
    times = draw_resamples(5, 3, 200, np.random.default_rng(0))
    assert times.shape == (200, 5) and (times.sum(1) == 5).all()
    assert np.count_nonzero(times, axis=1).min() == 3
    assert np.count_nonzero(draw_resamples(5, 1, 200, np.random.default_rng(0)), axis=1).min() < 3
