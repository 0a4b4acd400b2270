"""What else differs between the arms that a grid compares: a table, and warnings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arms import Arm
from .axes import Axis
from .claims import Claim
from .differences import (
    LAYERS,
    ComparedArm,
    ConfigDifference,
    classified_differences,
    keys_written,
)
from .report_options import Report
from .sizes import SIZE_NAMES as SIZES

SIZE_TOLERANCE = 0.05
"""Sizes that differ by at most this share count as equal."""
LEARNING_RATE = "model.lr"
NAMED_AT_MOST = 3
"""A line names so many pairs of arms, and counts the others."""

ArmPair = tuple[str, str]
ArmMetrics = Mapping[str, Mapping[str, Any]]
"""arm -> name -> figure: its sizes, and what was measured of it."""


@dataclass(frozen=True)
class Confounds:
    """What differs between the compared arms of a grid beside what its axes imply.

    facts: name -> arm -> value. The value of a layer's field is a list, one of each in the arm.
    notes: sentences that hold for every arm.
    warnings: lines that name arms, a fault and the way out.
    hidden: pairs of arms with the differences that their options do not write.
    """

    facts: dict[str, dict[str, Any]]
    notes: list[str]
    warnings: list[str]
    hidden: list[dict[str, Any]]

    @property
    def table(self) -> list[list[str]]:
        """The head row, then one row per arm."""
        arms = dict.fromkeys(arm for values in self.facts.values() for arm in values)
        rows = [
            [arm, *(_table_cell(name, arm, v) for name, v in self.facts.items())] for arm in arms
        ]
        return [["arm", *map(fact_title, self.facts)], *rows]


def fact_title(fact: str) -> str:
    """The name of a fact in words."""
    return fact.replace("_", " ").replace("flops per", "FLOPs per") if fact in SIZES else fact


def compared_pairs(
    report: Report | None, claims: Sequence[Claim], arms: Mapping[str, Arm]
) -> list[ArmPair]:
    """The pairs of arms that a grid's contrasts and claims compare. If it has none, the pairs that
    differ on one axis and agree on the others that both have."""
    found = [pair for each in (report.contrasts if report else ()) for pair in each.pairs]
    found += [(claim.arm, claim.minus) for claim in claims if claim.minus is not None]
    if not found:
        for one, other in itertools.combinations(arms, 2):
            a, b = arms[one], arms[other]
            if sum(a[axis] != b[axis] for axis in a.keys() & b.keys()) == 1:
                found.append((one, other))
    return [*dict.fromkeys(found)]


def find_confounds(
    sides: Mapping[str, ComparedArm],
    pairs: Sequence[ArmPair],
    axes: Mapping[str, Axis],
    tuning: Mapping[str, Axis],
    figures: ArmMetrics,
    matched: bool,
) -> Confounds:
    """Find what differs within pairs of arms beside what the axes imply.

    Args:
        sides: the arms by name. A pair is left out if one of its arms is missing here.
        pairs: the arms that are compared.
        axes: those of the grid.
        tuning: the axes by which every arm is tuned.
        figures: sizes and measured figures by arm.
        matched: whether the grid makes its arms equally large.
    """
    tuned = keys_written(
        each for a in tuning.values() for option in a.options.values() for each in option.overrides
    )
    pairs = [pair for pair in pairs if pair[0] in sides and pair[1] in sides]
    listed: dict[str, ConfigDifference] = {}
    hidden: list[tuple[ArmPair, list[ConfigDifference]]] = []
    unsized: list[ArmPair] = []
    for pair in pairs:
        found = classified_differences(axes, tuned, *(sides[arm] for arm in pair))
        listed |= {each.name: each for each, kind in found if kind != "implied"}
        if faults := [each for each, kind in found if kind == "hidden"]:
            hidden.append((pair, faults))
        implied = [each for each, kind in found if kind == "implied"]
        if not matched and not any(all(map(_is_numeric, each.values)) for each in implied):
            unsized.append(pair)
    arms = [arm for arm in sides if any(arm in pair for pair in pairs)]
    facts = {name: _values_by_arm(each, sides, arms) for name, each in listed.items()}
    for name in dict.fromkeys(name for arm in arms for name in figures.get(arm, {})):
        values = {arm: figures[arm][name] for arm in arms if name in figures.get(arm, {})}
        if any(values.get(one) != values.get(other) for one, other in pairs):
            facts[name] = values
    notes = [] if facts else ["The arms that are compared differ in nothing else."]
    notes.append(_learning_rate_note([sides[arm] for arm in arms], LEARNING_RATE in tuned.keys))
    return Confounds(
        facts,
        notes if arms else [],
        [*_hidden_warnings(hidden), *_size_warnings(unsized, figures)],
        [
            {"pair": [*pair], "differs": {each.name: [*each.values] for each in faults}}
            for pair, faults in hidden
        ],
    )


def _values_by_arm(
    each: ConfigDifference, sides: Mapping[str, ComparedArm], arms: Sequence[str]
) -> dict[str, Any]:
    """The value of each arm where some arms differ."""
    if each.name == LAYERS:
        return {arm: [name for name, _ in sides[arm].layers] for arm in arms}
    if each.owners is None:
        return {arm: sides[arm].keys[each.name] for arm in arms if each.name in sides[arm].keys}
    found = {arm: sides[arm].values(each.name) for arm in arms}
    return {arm: values for arm, values in found.items() if values}


def _hidden_warnings(found: Sequence[tuple[ArmPair, list[ConfigDifference]]]) -> list[str]:
    """One line per set of names that differ, with the pairs that differ in it."""
    groups: dict[tuple[str, ...], list[tuple[ArmPair, list[ConfigDifference]]]] = {}
    for pair, faults in found:
        key = tuple(sorted({each.name for each in faults}))
        groups.setdefault(key, []).append((pair, faults))
    lines = []
    for group in groups.values():
        told = [f"{each.name} ({_both_values(each)})" for each in group[0][1]]
        what = ", ".join(told[:-1]) + " and " + told[-1] if len(told) > 1 else told[0]
        lines.append(
            f"{pair_names([pair for pair, _ in group])}: differ in {what}, which their options do "
            f"not both write; make it equal, or write it in the options of both arms"
        )
    return lines


def _both_values(each: ConfigDifference) -> str:
    return " against ".join(value_text(value) for value in each.values)


def pair_names(pairs: Sequence[ArmPair]) -> str:
    """The first few pairs by name, and how many more there are."""
    more = f" and {len(pairs) - NAMED_AT_MOST} more" if len(pairs) > NAMED_AT_MOST else ""
    return "; ".join(" - ".join(pair) for pair in pairs[:NAMED_AT_MOST]) + more


def _size_warnings(pairs: Sequence[ArmPair], figures: ArmMetrics) -> list[str]:
    """A line with the largest ratio of each size, over pairs that are not about sizes."""
    told = []
    for name in ("parameters", "state_bytes", "flops_per_token"):
        ratios = dict[ArmPair, float]()
        for pair in pairs:
            values = sorted(figures[arm][name] for arm in pair if name in figures.get(arm, {}))
            if len(values) == 2 and values[0] > 0:
                ratios[pair] = values[1] / values[0]
        most = max(ratios, key=lambda pair: ratios[pair], default=None)
        if most is not None and ratios[most] > 1 + SIZE_TOLERANCE:
            told.append(f"{fact_title(name)} {ratios[most]:.3g} times ({pair_names([most])})")
    if not told:
        return []
    return [
        f"arms that are compared are not equally large: at most {', '.join(told)}; match them by "
        f"one of these, or compare them at several sizes"
    ]


def _learning_rate_note(sides: Sequence[ComparedArm], tuned: bool) -> str:
    rates = dict.fromkeys(str(side.keys.get(LEARNING_RATE)) for side in sides)
    if tuned:
        return "The learning rate is tuned for every arm."
    if len(rates) == 1:
        return f"The learning rate is {next(iter(rates))} for every arm, and tuned for none."
    return "The learning rate is tuned for no arm."


def _table_cell(name: str, arm: str, values: Mapping[str, Any]) -> str:
    if arm not in values:
        return "-"
    return f"{values[arm]:,.0f}" if name in SIZES else value_text(values[arm])


def value_text(value: Any) -> str:
    """A value of a config, or a list of such values, as it is shown."""
    if isinstance(value, list):
        return ", ".join(map(value_text, value)) or "none"
    if isinstance(value, Mapping):
        whose = str(value.get("name", value.get("class_path", ""))).rpartition(".")[2]
        inner = value.get("init_args", {}) if "class_path" in value else value
        told = [f"{name}={value_text(x)}" for name, x in inner.items() if name != "name"]
        return f"{whose}({', '.join(told)})" if told else whose
    if value is None or value is False:
        return "none"
    return "on" if value is True else f"{value:.10g}" if _is_numeric(value) else str(value)


def _is_numeric(value: Any) -> bool:
    """Whether it is a number, or a list of numbers."""
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)
