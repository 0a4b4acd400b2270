"""Specs and configs: what YAML holds, checked, with errors that name the place and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import (
    Any,
    Literal,
    Self,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

Spec = str | Mapping[str, Any]
"""A layer's registered name, or a mapping of ``name`` and its config fields."""


class SpecError(Exception):
    """Bad input: the message is one line that names the place, the fault and the way out.

    Not a ValueError, which a config parser would catch and bury in a message of its own.
    """


class Diverged(Exception):
    """Training met a number that is not finite: the message says at which step, and in which
    tensor first."""


@contextmanager
def error_at(place: str) -> Iterator[None]:
    """Prefix any `SpecError` raised inside with the place where the user wrote the fault."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from None


def suggest(word: object, known: Iterable[str]) -> str:
    """The way out of a mistyped name: the nearest known one, else all of them."""
    known = sorted(known)
    near = [name for name in known if name.casefold() == str(word).casefold()]
    near = near or difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def require(condition: object, message: str) -> None:
    """Raise a `SpecError` with this message unless the condition holds."""
    if not condition:
        raise SpecError(message)


def divide(total: int, parts: int, what: str) -> int:
    """`total / parts`, which must be whole."""
    if total % parts:
        raise SpecError(f"{what}: {parts} does not divide {total}")
    return total // parts


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """Base of every config: a subclass statement makes a frozen, keyword-only dataclass.

    Values are checked against their annotations (bool, int, float, str, Literal, tuple, Sequence
    and unions of them; a list becomes a tuple, a float is finite, an int has 64 bits) and in
    `check`, which a subclass
    overrides to refuse impossible values.

    Raises:
        SpecError: an unknown field, a value of the wrong type, or one that `check` refuses.
    """

    # Without an annotation, which jsonargparse would look up in the subclass's module.
    reasons = types.MappingProxyType[str, str]({})
    """Of fields that take fewer values than in the base class: why."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, hint = getattr(self, field.name), hints[field.name]
            if isinstance(value, list):  # YAML has no tuples
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if isinstance(value, Mapping) and isinstance(hint, type) and issubclass(hint, Config):
                with error_at(field.name):
                    value = hint.from_fields(value)
                object.__setattr__(self, field.name, value)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise SpecError(f"{field.name}: must be finite, got {value!r}")
                if isinstance(number, int) and number.bit_length() > 63:
                    raise SpecError(f"{field.name}: {value} does not fit 64 bits")
            if not _matches(value, hint):
                want = _describe(hint)
                why = self.reasons.get(field.name)
                got = f"{value!r}: {why}" if why else repr(value)
                raise SpecError(f"{field.name}: expected {want}, got {got}")
        if self.with_setting() is self:  # another config has been checked when it was made
            self.check()

    def check(self) -> None:
        """Refuse values that are of the right type but make no sense."""

    def with_setting(self) -> Self:
        """The config that counts, where the value of a field stands for those of others."""
        return self

    @classmethod
    def fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        return dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Any:
        """Build from a mapping, naming unknown and missing fields."""
        known = {field.name: field for field in cls.fields()}
        for name in fields:
            if name not in known:
                raise SpecError(f"unknown field '{name}'; {suggest(name, known)}")
        for name, field in known.items():
            if name not in fields and required(field):
                raise SpecError(f"{name}: missing, and it has no default")
        return cls(**fields)

    @classmethod
    def takes(cls, name: str, value: Any) -> bool:
        """Whether the config has a field of this name, and the value is of its type."""
        if isinstance(value, list):
            value = tuple(value)
        return name in field_types(cls) and _matches(value, field_types(cls)[name])

    @classmethod
    def nearest_first(cls) -> list[dataclasses.Field[Any]]:
        """The fields, those that the class itself declares in front of those of its bases."""
        known = {field.name: field for field in cls.fields()}
        names = (name for base in cls.__mro__ for name in inspect.get_annotations(base))
        return [known[name] for name in dict.fromkeys(names) if name in known]

    def field_values(self) -> dict[str, Any]:
        """The fields' values, as they are."""
        return {field.name: getattr(self, field.name) for field in self.fields()}

    def to_fields(self) -> dict[str, Any]:
        """The inverse of `from_fields`, in plain types that YAML and JSON hold."""
        return {name: plain(value) for name, value in self.field_values().items()}


def required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


@functools.cache
def field_types(config: type[Config]) -> dict[str, Any]:
    """The types of all fields, by name."""
    return get_type_hints(config)


def _matches(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin in (tuple, Sequence):
        if not isinstance(value, tuple):
            return False
        items = args if _fixed(hint) else args[:1] * len(value)
        return len(value) == len(items) and all(map(_matches, value, items))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _fixed(hint: Any) -> bool:
    """Whether the hint of a list says how many items it has."""
    return get_origin(hint) is tuple and get_args(hint)[-1] is not ...


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin in (tuple, Sequence):
        count = f"{len(args)} of " if _fixed(hint) else ""
        return f"a list of {count}{_describe(args[0])}"
    if origin is dict:
        return "a mapping"
    return "null" if hint is type(None) else getattr(origin or hint, "__name__", str(hint))


def plain(value: Any) -> Any:
    """A field's value in types that YAML and JSON hold."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "spec"):
        return value.spec()
    return value.to_fields() if isinstance(value, Config) else value
