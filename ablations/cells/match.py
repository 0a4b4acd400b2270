"""Arms of equal size: a knob of each is turned until its model is as large as the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from layerzoo.spec import Config, SpecError, error_at, suggest

from .configs import Tree
from .sizes import (
    NETWORK_KNOBS,
    SizeName,
    knob_start,
    layer_knobs,
    measure_sizes,
    sizes_of,
    with_knob,
)

SEARCH_RADIUS = 64
"""How far from a value to look for one whose model builds."""


class Match(Config):
    """Makes the arms' models equally large."""

    by: SizeName
    """Models are compared by parameters, by flops of the forward pass per token, or by state_bytes
    after as many tokens as a sample of the arm's task has."""
    to: Any = None
    """Models are matched to an arm, by its name or as {axis: option}, or a number; null is
    the first arm."""
    tolerance: float = 0.05
    """An arm may differ from it by this share."""
    solve: tuple[str, ...] = ("heads", "dim")
    """An arm that is further away is changed in these, each alone and in this order: `dim` and
    `mlp` of the network, or a whole-numbered field of its layers, to one value in all of them."""

    def check(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise SpecError(f"tolerance: must be at least 0 and below 1, got {self.tolerance}")
        if not self.solve:
            raise SpecError("solve: needs at least one name, such as dim")


def match_models(
    match: Match, configs: Mapping[str, Tree], arms: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[Tree, dict[str, Any]]]:
    """Every arm's config with a network of the size that `match` asks for, and a record of how:
    {by, target, achieved, deviation, solved}, where solved is {knob: value} or empty.

    Args:
        configs: the resolved configs by arm.
        arms: the options of each arm, axis -> option.

    Raises:
        SpecError: no such arm or knob, or an arm that cannot be made so.
    """
    known = {*NETWORK_KNOBS}.union(*map(layer_knobs, configs.values()))
    for knob in match.solve:
        if knob not in known:
            raise SpecError(f"solve: no arm has such a knob, '{knob}'; {suggest(knob, known)}")
    with error_at("to"):
        target, whose = _target_size(match, configs, arms)
    out = {}
    for arm, config in configs.items():
        place = f"{arm}: {target:,.0f} {match.by} wanted{whose}"
        config, solved = _solve(match, config, target, place)
        achieved = _size_of(match, config)
        record = {"by": match.by, "target": target, "achieved": achieved}
        out[arm] = config, {**record, "deviation": achieved / target - 1, "solved": solved}
    return out


def _size_of(match: Match, config: Tree) -> float:
    return getattr(measure_sizes(config), match.by)


def _target_size(
    match: Match, configs: Mapping[str, Tree], arms: Mapping[str, Mapping[str, str]]
) -> tuple[float, str]:
    """The figure to reach, and whose it is, in words."""
    to = next(iter(configs)) if match.to is None else match.to
    if isinstance(to, (int, float)) and not isinstance(to, bool):
        if not 0 < to < math.inf:
            raise SpecError(f"must be positive, got {to}")
        return to, ""
    if isinstance(to, Mapping):
        wanted = {str(axis): str(option) for axis, option in to.items()}
        names = [arm for arm, options in arms.items() if wanted.items() <= options.items()]
        to = ",".join(f"{axis}: {option}" for axis, option in wanted.items())
    else:
        names = [arm for arm in configs if arm == str(to)]
    if not names:
        raise SpecError(f"no arm '{to}'; {suggest(to, configs)}")
    figures = {_size_of(match, configs[name]) for name in names}
    if len(figures) > 1:
        raise SpecError(
            f"the arms of {to} differ in {match.by} ({'; '.join(names)}); name one of them"
        )
    return figures.pop(), f" (of {names[0]})"


def _solve(match: Match, config: Tree, target: float, place: str) -> tuple[Tree, dict[str, float]]:
    """The config with the first knob that comes near enough at its best value."""

    def share(figure: float) -> float:
        return figure / target - 1

    here = _size_of(match, config)
    if abs(share(here)) <= match.tolerance:
        return config, {}
    tried = []
    for knob in match.solve:
        start = knob_start(config, knob)
        if start is None:
            tried.append(f"{knob}: none of its layers has it")
            continue
        found = _searched_sizes(match.by, config, knob, start, target)
        if len(found) < 2 or {*found.values()} == {here}:
            tried.append(f"{knob}: {'changes nothing' if found else 'no value builds'}")
            continue
        value = min(found, key=lambda v, start=start: (abs(found[v] - target), abs(v - start)))
        whole, setting = with_knob(config, knob, value)
        if abs(share(_size_of(match, whole))) <= match.tolerance:
            return whole, {knob: setting}
        nearest = f"{found[value]:,.0f} at {setting:g} ({share(found[value]):+.1%})"
        tried.append(f"{knob}: nearest {nearest}")
    raise SpecError(
        f"{place}, not {here:,.0f}; {'; '.join(tried)}; tolerance {match.tolerance:.0%}; give "
        f"another solve, match by another figure, or a larger tolerance"
    )


def _searched_sizes(
    by: SizeName, config: Tree, knob: str, start: int, target: float
) -> dict[int, float]:
    """The figures of the values of a knob that `search` has come by."""

    def figure(value: int) -> float | None:
        try:
            return getattr(sizes_of(with_knob(config, knob, value)[0]), by)
        except SpecError:  # it does not build
            return None

    return {v: f for v, f in search_knob(figure, start, target).items() if f is not None}


def search_knob(
    figure: Callable[[int], float | None], start: int, target: float
) -> dict[int, float | None]:
    """The figures of the values, from 0 on, that lead to the target, in steps of twice and half
    and then by bisection: figures rise or fall with the value, where there is one."""
    seen: dict[int, float | None] = {}

    def near(value: int, low: float, high: float) -> int | None:
        """The nearest value between the two that has a figure."""
        for step in range(SEARCH_RADIUS):
            for v in (value - step, value + step):
                if low < v < high:
                    if v not in seen:
                        seen[v] = figure(v)
                    if seen[v] is not None:
                        return v
        return None

    def off(value: int) -> float:
        found = seen[value]
        assert found is not None
        return found - target

    first = near(start, -1, math.inf)
    for up in (True, False):
        last = first
        while last is not None:
            there = near(max(1, 2 * last), last, math.inf) if up else near(last // 2, -1, last)
            if there is None or (abs(off(there)) >= abs(off(last)) and off(there) * off(last) > 0):
                break
            if off(there) * off(last) <= 0:
                low, high = sorted((last, there))
                while (middle := near((low + high) // 2, low, high)) is not None:
                    if off(middle) * off(low) > 0:
                        low = middle
                    else:
                        high = middle
                return seen
            last = there
    return seen
