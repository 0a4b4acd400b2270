"""Arguments, checked against the forms that a signature states, before any implementation runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from layerzoo.annotations import Form, Many, open_sums, read_annotation
from layerzoo.ops import transforming
from layerzoo.spec import SpecError

P = ParamSpec("P")
R = TypeVar("R")


class Bound(NamedTuple):
    """The values that an argument may have, ends included, and the way out for others."""

    low: float
    high: float
    way_out: str


LOGARITHM = Bound(-math.inf, 0.0, "give its logarithm, which is not positive")
POSITIVE = Bound(0.0, math.inf, "it must be positive")
FRACTION = Bound(0.0, 1.0, "give a fraction")


SEEN = 1000
"""Combinations of shapes that an op remembers."""


class Signature:
    """What an op's arguments are checked against: the forms of its annotations.

    The op calls `check` itself, and not while torch.compile traces: a function around it would be
    one frame more, which breaks a graph once more where the op does.

    Args:
        state: of what form the state is, if its annotation does not say so.
        bounds: of the values of arguments. They are read on a CPU alone: elsewhere that would wait
            for the device. Nor are they read inside torch.func.
    """

    def __init__(self, state: Any = None, **bounds: Bound) -> None:
        self.state, self.bounds = state, bounds
        self.name = ""
        self.plan: list[tuple[str, Any, bool]] = []
        self.names: list[str] = []
        self.seen: dict[tuple[Any, ...], Match] = {}

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Decorator: take the forms of a function's annotations."""
        self.name = getattr(fn, "__name__", "")
        texts = {name: text for name, text in fn.__annotations__.items() if name != "return"}
        forms = {name: read_annotation(text) for name, text in texts.items()}
        self.plan = [(name, *form) for name, form in forms.items() if form[0] is not None]
        # A sum of two letters comes last: the others say what one of them is.
        self.plan.sort(key=lambda entry: open_sums(entry[1]))
        self.names = [name for name, *_ in self.plan]
        return fn

    def check(self, given: dict[str, Any]) -> None:
        """Raises SpecError where the arguments, by name, do not fit; `locals()` has them first.

        Shapes that have fitted are known again, for the sake of decoding; a cache grows, and so it
        is looked at every time."""
        key: list[Any] = []
        for name in self.names:
            value = given[name]
            if type(value) is Tensor:
                key += (value.shape, value.dtype, value.is_cpu)
            else:
                key.append(_sizes(value))
        found = self.seen.get(known := tuple(key))
        if found is None:
            found = self._match(given)
            if len(self.seen) >= SEEN:
                self.seen.clear()
            self.seen[known] = found
        if self.state is not None and given["state"] is not None:
            found = found.copy()
            found.fit(self.state, given["state"], "state")
        for name, bound in self.bounds.items():
            found.within(bound, given[name], name)

    def _match(self, given: dict[str, Any]) -> Match:
        found = Match(self.name)
        for name, form, optional in self.plan:
            value = given[name]
            if value is not None or not optional:
                found.fit(form, value, name)
        return found


def _sizes(value: Any) -> Any:
    """What `Match` looks at, of any value."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.is_cpu
    if isinstance(value, (tuple, list)):
        return type(value), *map(_sizes, value)
    return type(value)


class Match:
    """The sizes of letters, as the arguments of one call have them. place: of whom they are."""

    __slots__ = ("device", "place", "sizes")

    def __init__(self, place: str, **sizes: int) -> None:
        self.place, self.sizes = place, sizes
        self.device: torch.device | None = None

    def copy(self) -> Match:
        found = Match(self.place, **self.sizes)
        found.device = self.device
        return found

    def fit(self, form: Any, value: Any, name: str) -> None:
        """Raises SpecError where a value is not of the form."""
        if type(form) is Form:
            self._tensor(form, value, name)
        elif form is not None:
            self._parts(form, value, name)

    def _parts(self, stated: Any, value: Any, name: str) -> None:
        kind: Any = tuple if type(stated) is Many else type(stated)
        if not isinstance(value, kind):
            raise self._error(name, f"is a {type(value).__name__} instead of a {kind.__name__}")
        form: Any = (stated.each,) * len(value) if type(stated) is Many else stated
        if kind is dict and value.keys() != form.keys():
            raise self._error(name, f"has {sorted(value)} instead of {sorted(form)}")
        if len(value) != len(form):
            raise self._error(name, f"has {len(value)} parts instead of {len(form)}")
        for key in form if kind is dict else range(len(form)):
            self.fit(form[key], value[key], f"{name}.{key}")

    def _tensor(self, form: Form, value: Any, name: str) -> None:
        if not isinstance(value, Tensor):
            if form.number and isinstance(value, (int, float)):
                return
            what = "None" if value is None else f"a {type(value).__name__}"
            raise self._error(name, f"is {what} instead of a tensor {' or '.join(form.texts)}")
        shape, sizes, known = value.shape, self.sizes, len(self.sizes)
        axes = form.shapes.get(len(shape))
        fits = axes is not None
        get: Any = sizes.get
        for axis, n in zip(axes or (), shape):  # noqa: B905 (of one length; asked at every call)
            if axis is not None and get(axis, axis) != n and not self._new(axis, n, name):
                fits = False
                break
        if not fits:
            raise self._error(name, f"shape {tuple(shape)} is {self._wanted(form, known)}")
        if value.is_floating_point() == form.integer:
            want = "integers" if form.integer else "floating-point numbers"
            raise self._error(name, f"is of {value.dtype}, expected {want}")
        if axes:
            device = value.device
            if self.device is None:
                self.device = device
            elif device != self.device:
                raise self._error(name, f"is on {device}, what is before it {self.device}")

    def _new(self, axis: Any, n: int, name: str) -> bool:
        """Whether an axis that is not known to have size n may have it: new letters get it."""
        if type(axis) is tuple:
            return self._sum(axis, n)
        if type(axis) is int or axis in self.sizes:
            return False
        if axis == "G" and (n == 0 or self.sizes["H"] % n):
            fault = f"{self.sizes['H']} query heads do not divide among {n} key heads"
            raise self._error(name, fault)
        self.sizes[axis] = n
        return True

    def _sum(self, terms: Any, n: int) -> bool:
        sizes, new = self.sizes, None
        for count, letter in terms:
            if letter in sizes:
                n -= count * sizes[letter]
            else:
                new = count, letter
        if new is None:
            return n == 0
        sizes[new[1]] = n // new[0]
        return n > 0 and n % new[0] == 0

    def _wanted(self, form: Form, known: int) -> str:
        """What the shape is not, with the sizes that were known before."""
        first, *others = form.texts
        what = f"none of {', '.join(form.texts)}"
        if len(others) < 2:
            what = f"neither {first} nor {others[0]}" if others else f"not {first}"
        sizes = [
            f"{letter} = {n}"
            for letter, n in list(self.sizes.items())[:known]
            if any(letter in text for text in form.texts)
        ]
        return f"{what} with {', '.join(sizes)}" if sizes else what

    def within(self, bound: Bound, value: Any, name: str) -> None:
        """Raises SpecError where a value is out of bounds. (What is no number passes, and is seen
        in the output.)"""
        if not isinstance(value, Tensor) or not _readable(value):
            return
        with torch.no_grad() if value.requires_grad else nullcontext():
            if bound.high < math.inf and (most := value.max().item()) > bound.high:
                raise self._error(name, f"{most:g} is above {bound.high:g}; {bound.way_out}")
            if bound.low > -math.inf and (least := value.min().item()) < bound.low:
                raise self._error(name, f"{least:g} is below {bound.low:g}; {bound.way_out}")

    def _error(self, name: str, fault: str) -> SpecError:
        return SpecError(f"{self.place}: {name}: {fault}")


def _readable(value: Tensor) -> bool:
    """Whether a tensor has values here and now: some, on the CPU, and itself instead of a stand-in
    or a transform's."""
    return (
        value.is_cpu
        and type(value) in (Tensor, nn.Parameter)
        and value.numel() > 0
        and not transforming()
    )
