"""The `report` of a grid file: what its cells are compared by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerzoo.spec import Config, SpecError, suggest
from layerzoo.support.field_docs import read_config

from .arms import Arm, arm_name
from .axes import Axis
from .source import Source


@dataclass(frozen=True)
class Contrast:
    """A difference, first minus second, of arms that are paired: of each pair at each seed."""

    label: str
    pairs: tuple[tuple[str, str], ...]


class ScalingLaw(Config):
    """A figure as a power law of sizes, see `reporting.scaling.fit_scaling`."""

    y: str
    """The law is fitted to this figure of the test split."""
    x: tuple[str, ...]
    """The law has one or two sizes, as metrics.json names them."""
    by: tuple[str, ...] = ()
    """Each option of these axes has a law of its own."""
    rises: bool = False
    """If true, the figure grows with the size."""

    def check(self) -> None:
        if len(self.x) not in (1, 2):
            raise SpecError(f"x: needs one size or two, got {len(self.x)}")


class Report(Config):
    """What the report of a grid shows, beside what it finds by itself."""

    metric: str | None = None
    """The report leads with this figure; null is the accuracy that the task has."""
    columns: tuple[str, ...] = ()
    """The table has a column for each of these figures of the test split, and they are contrasted,
    too."""
    by: tuple[str, ...] = ()
    """Arms are grouped by these axes."""
    baseline: str | None = None
    """Every other arm is compared with this one, seed by seed."""
    contrasts: tuple[Any, ...] = ()
    """Further comparisons are two arms, [arm, arm], or {axis: [option, option], ..}: all pairs of
    arms that differ in this axis and agree in all others that both have. Further axes, each with
    one option, select among the arms that have these axes."""
    scaling: tuple[Any, ...] = ()
    """The report fits these laws, each by the fields of `ScalingLaw`."""


def read_report(source: Source, axes: Mapping[str, Axis], arms: Sequence[Arm]) -> Report:
    """The report, its baseline and its contrasts as `Contrast`s, its scaling as `ScalingLaw`s."""
    with source.locating("report"):
        report: Report = read_config(Report, source.value("report"))
    _require_axes(source, axes, report.by, "report", "by")
    names = [arm_name(arm) for arm in arms]
    contrasts: list[Contrast] = []
    if report.baseline is not None:
        base = arms[names.index(_read_arm(source, names, "report", "baseline"))]
        contrasts += [_with_baseline(arm, base) for arm in arms if arm is not base]
    for n, item in enumerate(report.contrasts):
        place = ("report", "contrasts", str(n))
        read = _by_axis if isinstance(item, dict) else _by_arms
        contrasts.append(read(source, axes, arms, *place))
    laws = []
    for n, fields in enumerate(report.scaling):
        place = ("report", "scaling", str(n))
        if not isinstance(fields, dict):
            raise source.error(place, f"expected y, x, .., got {fields!r}")
        with source.locating(*place):
            law: ScalingLaw = read_config(ScalingLaw, fields)
        _require_axes(source, axes, law.by, *place, "by")
        laws.append(law)
    return Report(
        metric=report.metric,
        columns=report.columns,
        by=report.by,
        baseline=report.baseline,
        contrasts=tuple(contrasts),
        scaling=tuple(laws),
    )


def _require_axes(
    source: Source, axes: Mapping[str, Axis], names: Sequence[str], *place: str
) -> None:
    for n, axis in enumerate(names):
        if axis not in axes:
            raise source.error((*place, str(n)), f"no such axis; {suggest(axis, axes)}")


def _read_arm(source: Source, names: Sequence[str], *place: str) -> str:
    name = source.written(*place)
    if name not in names:
        raise source.error(place, f"no arm '{name}'; {suggest(name, names)}")
    return name


def _with_baseline(arm: Arm, base: Arm) -> Contrast:
    """A contrast with the baseline. If the arms differ on one axis that both have, it is named by
    that axis."""
    names = arm_name(arm), arm_name(base)
    differ = [axis for axis in arm.keys() & base.keys() if arm[axis] != base[axis]]
    if len(differ) != 1:
        return Contrast(" - ".join(names), (names,))
    (axis,) = differ
    return Contrast(f"{axis}: {arm[axis]} - {base[axis]}", (names,))


def _by_arms(
    source: Source, axes: Mapping[str, Axis], arms: Sequence[Arm], *place: str
) -> Contrast:
    pair = source.value(*place)
    if not isinstance(pair, list) or len(pair) != 2:
        fault = f"expected two arms, [arm, arm], or {{axis: [option, option]}}, got {pair!r}"
        raise source.error(place, fault)
    names = [arm_name(arm) for arm in arms]
    first, second = (_read_arm(source, names, *place, side) for side in "01")
    return Contrast(f"{first} - {second}", ((first, second),))


def _by_axis(
    source: Source, axes: Mapping[str, Axis], arms: Sequence[Arm], *place: str
) -> Contrast:
    """Of `{axis: [option, option], other: option}`."""
    varied: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    for name, options in source.value(*place).items():
        inner = (*place, name)
        if name not in axes:
            raise source.error(inner, f"no such axis; {suggest(name, axes)}")
        if isinstance(options, list):
            sides = [(*inner, str(n)) for n in range(len(options))]
            varied[name] = [axes[name].label_at(source, side) for side in sides]
        else:
            where[name] = axes[name].label_at(source, inner)
    if len(varied) != 1:
        raise source.error(place, "expected one axis with two options, [option, option]")
    ((axis, options),) = varied.items()
    if len(options) != 2 or options[0] == options[1]:
        raise source.error((*place, axis), "expected two different options")
    first, second = options
    meant = [
        arm for arm in arms if all(arm.get(other, only) == only for other, only in where.items())
    ]
    pairs = tuple(
        (arm_name(one), arm_name(other))
        for one, other in itertools.product(meant, meant)
        if (one.get(axis), other.get(axis)) == (first, second)
        and all(one[name] == other[name] for name in one.keys() & other.keys() - {axis})
    )
    if not pairs:
        fault = f"no two of these arms differ in {axis} alone, {first} and {second}; name two"
        raise source.error(place, fault)
    if len(pairs) == 1:
        return Contrast(" - ".join(pairs[0]), pairs)
    told = "".join(f", {name}={only}" for name, only in where.items())
    return Contrast(f"{axis}: {first} - {second}{told} ({len(pairs)} pairs of arms)", pairs)
