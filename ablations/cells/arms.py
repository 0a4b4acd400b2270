"""The arms of a grid: what its conditions, its design and its exclusions leave of the product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from layerzoo.spec import suggest

from .axes import Axis
from .source import Source

Arm = dict[str, str]
"""Axis -> option."""
ArmFilter = dict[str, tuple[str, ...]]
"""Axis -> the options that are meant."""


def arm_name(arm: Arm) -> str:
    """Of an arm, and of no other: where two first differ, they differ in a label."""
    return ",".join(arm.values())


def read_arm_filter(source: Source, axes: Mapping[str, Axis], *place: str) -> ArmFilter:
    """`axis: option` or `axis: [option, ..]` of a place."""
    where = source.value(*place)
    if not isinstance(where, dict) or not where:
        raise source.error(place, f"expected axis: option, got {where!r}")
    out = {}
    for name, options in where.items():
        inner = (*place, name)
        if name not in axes:
            raise source.error(inner, f"no such axis; {suggest(name, axes)}")
        items = [inner]
        if isinstance(options, list):
            items = [(*inner, str(n)) for n in range(len(options))]
        out[name] = tuple(axes[name].label_at(source, item) for item in items)
    return out


def read_arms(
    source: Source, axes: Mapping[str, Axis], design: Literal["product", "one_at_a_time"]
) -> list[Arm]:
    """The arms that `when`, `design` and `exclude` leave of the product, in order.

    Raises:
        SpecError: an option is left in no arm, or an exclusion matches none.
    """
    arms = _expand(axes, _read_conditions(source, axes))
    _require_all(source, axes, arms, "when")
    if design == "one_at_a_time":
        firsts = {name: next(iter(axis.options)) for name, axis in axes.items()}
        arms = [arm for arm in arms if len(arm.items() - firsts.items()) <= 1]
        _require_all(source, axes, arms, "design: one_at_a_time")
    dropped: list[Arm] = []
    for n, _ in enumerate(source.value("exclude") or []):
        place = ("exclude", str(n))
        where = read_arm_filter(source, axes, *place)
        matching = [arm for arm in arms if passes(arm, where)]
        if not matching:
            raise source.error(place, "matches no arm; correct it, or drop it")
        dropped += matching
    arms = [arm for arm in arms if arm not in dropped]
    _require_all(source, axes, arms, "exclude")
    if long := next((name for name in map(arm_name, arms) if len(name.encode()) > 200), None):
        raise source.error(("axes",), f"'{long}' is too long for a folder; shorten the labels")
    return arms


def _read_conditions(source: Source, axes: Mapping[str, Axis]) -> dict[str, ArmFilter]:
    """Of the axes that are not in every arm."""
    conditions = {}
    earlier = [*axes]
    for name in source.value("when") or {}:
        place = ("when", name)
        if name not in axes:
            raise source.error(place, f"no such axis; {suggest(name, axes)}")
        conditions[name] = read_arm_filter(source, axes, *place)
        for other in conditions[name]:
            if earlier.index(other) >= earlier.index(name):
                raise source.error((*place, other), f"list axis {other} before axis {name}")
    return conditions


def _expand(axes: Mapping[str, Axis], conditions: Mapping[str, ArmFilter]) -> list[Arm]:
    arms: list[Arm] = [{}]
    for name, axis in axes.items():
        arms = [
            {**arm, **choice}
            for arm in arms
            for choice in (
                [{name: label} for label in axis.options]
                if passes(arm, conditions.get(name, {}))
                else [{}]
            )
        ]
    return arms


def passes(arm: Arm, where: ArmFilter) -> bool:
    """Whether the arm has one of the options of each of the axes."""
    return all(arm.get(axis) in options for axis, options in where.items())


def _require_all(source: Source, axes: Mapping[str, Axis], arms: Sequence[Arm], last: str) -> None:
    """Every option in an arm, else the filter that was applied last left it out."""
    for name, axis in axes.items():
        for label, option in axis.options.items():
            if not any(arm.get(name) == label for arm in arms):
                raise source.error(option.place, f"in no arm: {last} leaves it out")
