"""The axes of a grid: the forms in which a file writes them, and what their options set."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from layerzoo.spec import SpecError, suggest

from .source import Source

Place = tuple[str, ...]


class Override(NamedTuple):
    """A dotted key of the training config, its value, and where the grid file says so."""

    place: Place
    key: str
    value: Any


class Option(NamedTuple):
    """What an option of an axis sets, and where it is written."""

    place: Place
    overrides: tuple[Override, ...]


@dataclass(frozen=True)
class Axis:
    """An axis and its options by label."""

    name: str
    options: dict[str, Option]

    @property
    def numbers(self) -> list[float]:
        """What each option sets its first key to, if they are all numbers of one key; else []."""
        firsts = [option.overrides[0] for option in self.options.values() if option.overrides]
        values = [first.value for first in firsts]
        one_key = len(firsts) == len(self.options) and len({first.key for first in firsts}) == 1
        return values if one_key and all(type(v) in (int, float) for v in values) else []

    def label_at(self, source: Source, place: Place) -> str:
        """The option that a place names, by its label, or by its value if it is of a list."""
        names = (source.written(*place), _label_text(source.value(*place)))
        for label in (*names, *(f"{_last_key(self.name)}={name}" for name in names)):
            if label in self.options:
                return label
        raise source.error(place, f"no option '{names[0]}'; {suggest(names[0], self.options)}")


def checked_folder_name(name: str) -> str:
    """Refuse what cannot name a folder of results."""
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        raise SpecError(f"'{name}' is no folder name; use letters, digits and _.+=-")
    return name


def read_overrides(source: Source, *place: str) -> tuple[Override, ...]:
    """The `key: value` of a place."""
    values = source.value(*place)
    if not isinstance(values, dict):
        raise source.error(place, f"expected overrides, key: value, got {values!r}")
    return tuple(Override((*place, key), key, value) for key, value in values.items())


def read_axes(source: Source, *place: str) -> dict[str, Axis]:
    """The axes at a place, by name."""
    axes = source.value(*place)
    if not isinstance(axes, dict) or not axes:
        raise source.error(place, "needs at least one axis with one option")
    return {name: Axis(name, _read_options(source, *place, name)) for name in axes}


def _read_options(source: Source, *place: str) -> dict[str, Option]:
    form = source.value(*place)
    if isinstance(form, list):
        return _options_of_lists(source, {place[-1]: place})
    if not isinstance(form, dict) or not form:
        raise source.error(
            place, f"expected options: label: {{key: value}}, or a list of values; got {form!r}"
        )
    if all(isinstance(values, list) for values in form.values()):
        return _options_of_lists(
            source, {key: (*place, key) for key in form}, _last_key(place[-1])
        )
    options = {}
    for label in form:
        inner = (*place, label)
        with source.locating(*inner):
            checked_folder_name(label)
        options[label] = Option(inner, read_overrides(source, *inner))
    return options


def _options_of_lists(
    source: Source, lists: Mapping[str, Place], name: str = ""
) -> dict[str, Option]:
    """The options of lists of values by key: the n-th has the n-th value of each."""
    first, *_ = lists
    count = len(source.value(*lists[first]))
    for place in lists.values():
        values = source.value(*place)
        if not values or len(values) != count:
            wanted = f"{count} values, as many as {first} has" if values else "at least one value"
            raise source.error(place, f"expected {wanted}, got {len(values)}")
        for n, value in enumerate(values):
            if isinstance(value, (dict, list)):
                raise source.error(
                    (*place, str(n)),
                    "a list of options is of plain values; name each option, label: {key: value}",
                )
    options: dict[str, Option] = {}
    for n in range(count):
        places = {key: (*place, str(n)) for key, place in lists.items()}
        label = f"{name or _last_key(first)}={_label_text(source.value(*places[first]))}"
        with source.locating(*places[first]):
            checked_folder_name(label)
            if label in options:
                raise SpecError(f"'{label}' is an option already; drop one, or name each option")
        overrides = (Override(p, key, source.value(*p)) for key, p in places.items())
        options[label] = Option(places[first], tuple(overrides))
    return options


def _last_key(key: str) -> str:
    return key.rpartition(".")[2]


def _label_text(value: Any) -> str:
    """A plain value in a label: as YAML has it, and a number always in the same way."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
