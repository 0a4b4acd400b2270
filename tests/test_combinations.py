"""Options combined: a layer takes what the values of its fields make together, at a length at
which what grows has grown, or refuses it and says why. A new field or layer needs no edit here.
"""

from __future__ import annotations

import functools
import itertools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from torch.utils._pytree import tree_leaves

from layerzoo.layer import Layer
from layerzoo.memories.fast_weights import FastWeights
from layerzoo.memories.fast_weights.options import Option
from layerzoo.registry import build, get_layer, list_layers
from layerzoo.spec import Config, SpecError

from .covering import Row, covering

DIM = 16


def values(hint: Any) -> tuple[Any, ...]:
    """What a field can be set to by name: of a bool or a Literal; of any other type nothing."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [get_args(part) for part in parts if get_origin(part) is Literal]
    found += [(False, True)] if bool in parts else []
    found += [(None,)] if found and type(None) in parts else []
    return tuple(itertools.chain(*found))


@functools.cache
def named(config: type[Any]) -> dict[str, tuple[Any, ...]]:
    """The fields of a config that have values with names."""
    hints = get_type_hints(config)
    return {f.name: values(hints[f.name]) for f in config.fields() if values(hints[f.name])}


class Fields:
    """Of a layer the fields to combine and their values. The others are as in its first case.

    A field that holds an `Option` has the names of its axis as values, and the fields of these
    options, such as `network.bias`, are combined, too.
    """

    def __init__(self, cls: type[Layer]) -> None:
        self.cls = cls
        config = cls.Config.from_fields(cls.cases[0])
        self.values: dict[str, Sequence[Any]] = {**named(cls.Config)}
        self.options: dict[str, Option] = {}
        for field in cls.Config.fields():
            value = getattr(config, field.name)
            if isinstance(value, Option):
                self.options[field.name] = value
                self.values[field.name] = tuple(value.options)
                for option in value.options.values():
                    found = named(option).items()
                    self.values |= {f"{field.name}.{name}": known for name, known in found}

    def spec(self, row: Row) -> dict[str, Any]:
        spec = {"name": self.cls.name, **self.cls.cases[0]}
        spec |= {name: value for name, value in row.items() if "." not in name}
        for field, default in self.options.items():
            name = row[field]
            option = default.spec() if name == default.name else {"name": name}
            own = named(default.options[name])
            for path, value in row.items():
                inner = path.partition(f"{field}.")[2]
                # A field that this option lacks is left out at its first value, else refused.
                if inner and (inner in own or value != self.values[path][0]):
                    option[inner] = value
            spec[field] = option
        return spec

    def refusal(self, row: Row) -> str:
        """What the layer says against a row, in one line; nothing if it takes it."""
        try:
            build(self.spec(row), dim=DIM)
        except SpecError as error:
            return str(error)
        return ""

    def accepts(self, row: Row) -> bool:
        fields = self.spec(row)
        fields.pop("name")
        try:
            self.cls.Config.from_fields(fields)
        except SpecError:
            return False
        return True


def infinite(spec: Mapping[str, Any], T: int) -> list[str]:
    """What is not finite after T random tokens, or not there: output, state, and gradients."""
    torch.manual_seed(0)
    layer = build(spec, dim=DIM)
    x = torch.randn(2, T, DIM).requires_grad_()
    y, state = layer(x)
    found = {"output": y, **{f"state {n}": leaf for n, leaf in enumerate(tree_leaves(state))}}
    wide = [t for t in found.values() if t.is_floating_point()]
    torch.stack([(t * torch.randn_like(t)).sum() for t in wide]).sum().backward()
    leaves = {"input": x, **dict(layer.named_parameters())}
    found |= {f"gradient of {n}": p.grad for n, p in leaves.items()}
    return [name for name, t in found.items() if t is None or not torch.isfinite(t).all()]


PRESETS = {n for n in list_layers() if FastWeights in get_layer(n).__bases__}


@pytest.mark.parametrize("T", [70, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [  # A preset has the fields of fast_weights, at other defaults.
        pytest.param(n, marks=pytest.mark.slow if n in PRESETS else []) for n in list_layers()
    ],
)
def test_options_combine_or_are_refused(name: str, T: int) -> None:
    fields = Fields(get_layer(name))
    rows, never = covering(fields.values, fields.accepts)
    built = []
    for row in rows:
        spec = fields.spec(row)
        if message := fields.refusal(row):  # by what is only known with its dim
            check_refusal(message, row, row)
            continue
        built.append(row)
        found = infinite(spec, T)
        assert not found, f"{spec}: not finite: {', '.join(found)}"
    assert built, "a layer that takes nothing"
    for field, known in fields.values.items():
        useless = [v for v in known if not any(row[field] == v for row in built)]
        assert not useless, f"{field}: {useless} is in no spec that builds; do not list it"
    for pair in never:
        row = {**built[0], **pair}
        check_refusal(fields.refusal(row), pair, row)


def check_refusal(message: str, fields: Row, row: Row) -> None:
    """It is one line, and names one of the fields."""
    assert message and "\n" not in message, f"{row} builds, and is in no row"
    words = {word for path in fields for word in path.split(".")}
    assert any(word in message for word in words), f"{message!r} does not name {fields}"


@pytest.mark.parametrize("name", list_layers())
def test_values_that_a_layer_leaves_out_are_refused_with_the_reason(name: str) -> None:
    cls = get_layer(name)
    bases = [
        base for base in cls.Config.__mro__ if issubclass(base, Config) and base is not Config
    ]
    for field, own in named(cls.Config).items():
        inherited = itertools.chain(*(named(base).get(field, ()) for base in bases))
        for value in set(inherited) - set(own):
            with pytest.raises(SpecError) as error:
                build({"name": name, **cls.cases[0], field: value}, dim=DIM)
            reason = cls.Config.reasons[field]
            assert str(error.value).startswith(f"{name}: {field}: expected ")
            assert str(error.value).endswith(f", got {value!r}: {reason}")


@pytest.mark.parametrize(
    "sizes, most",
    [
        ((), 1),
        ((3,), 3),
        ((3, 4), 12),
        ((2, 2, 2, 2), 6),
        ((3, 3, 3, 3), 9),
        ((2,) * 10, 10),
        ((5, 4, 3, 3, 2, 2), 23),
        ((5, 4, 4, 3, 3, 3, 3) + (2,) * 9, 30),
    ],
)
def test_covering(sizes: tuple[int, ...], most: int) -> None:
    """The least is the product of the two largest; a greedy array needs little more."""
    fields = {f"f{n}": [f"{n}-{i}" for i in range(size)] for n, size in enumerate(sizes)}
    rows, never = covering(fields)
    assert (rows, never) == covering(fields)
    assert all(row.keys() == fields.keys() for row in rows) and not never
    assert math.prod(sorted(sizes)[-2:]) <= len(rows) <= most
    for a, b in itertools.combinations(fields, 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(fields[a], fields[b]))


@pytest.mark.parametrize("more", [0, 12])
def test_covering_under_refusals(more: int) -> None:
    """With few fields, where all rows are tried, and with many. Only what a row can have is
    covered, in rows that are accepted; the rest is told."""

    def accepts(row: Row) -> bool:
        return (row["a"] == 0 or row["b"] == row["c"] == 3) and (row["c"] != 3 or row["d"] == 1)

    fields = {name: range(4) for name in "abcd"} | {f"e{n}": range(2) for n in range(more)}
    rows, never = covering(fields, accepts)
    assert all(map(accepts, rows))
    refused = {(tuple(pair), tuple(pair.values())) for pair in never}
    for a, b in itertools.combinations(fields, 2):
        met = {(row[a], row[b]) for row in rows}
        left = {pair for names, pair in refused if names == (a, b)}
        assert met | left == set(itertools.product(fields[a], fields[b])) and not met & left
    small = itertools.product(range(4), repeat=4)
    good = [row for row in (dict(zip("abcd", r, strict=True)) for r in small) if accepts(row)]
    for (a, b), (i, j) in refused:
        assert {a, b} <= {*"abcd"} and not any(row[a] == i and row[b] == j for row in good)
