"""What differs between two arms, and which of it the grid file explains.

Two arms differ where their resolved configs hold different values that change a result. Layers are
compared by name. All fields are compared of a layer that both arms have. Where layers of one arm
replace layers of the other, the fields of the shell are compared, and a field that a layer lacks
counts as none. A layer that one arm has in addition is not compared.

A difference is of one of three kinds. Here the options of an arm are those that it has on the axes
on which the two arms differ.

*Implied*: the arms are compared for it. One of these holds:

- An axis that both arms have is about it. An axis is about what all its options set, apart from
  options that set nothing. If only one option sets anything, it has to set one thing alone.
- The arms have the same layers, and the options of both arms write this field.
- It is the only difference, and an option of one arm writes it.
- It is the vocabulary's size, and the task differs, too.

*Told*: the options of both arms write it, or tuning or matching sets it. If the layers of one arm
have no such field, it is enough that the options of the other write it.

*Hidden*: neither. A default made it, or one option sets more than its axis is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from layerzoo.shell import Shell

from .arms import Arm
from .axes import Axis, Override
from .cell import result_config
from .configs import Tree

SHELL_FIELDS = tuple(field.name for field in Shell.fields())
"""The fields that a layer has whatever its rule."""
LAYERS = "model.network.layers"
TASK_CLASS, TASK_OPTIONS, VOCABULARY_SIZE = (
    "data.class_path",
    "data.init_args.",
    "model.network.vocab_size",
)

DifferenceKind = Literal["implied", "told", "hidden"]


class ConfigDifference(NamedTuple):
    """A value that two arms do not share.

    name: a dotted key of the config, or a field of layers.
    values: the value in each arm; of a field, a list with the values of its layers.
    owners: the layers of each arm that have the field; None if the name is a key of the config.
    """

    name: str
    values: tuple[Any, Any]
    owners: tuple[frozenset[str], frozenset[str]] | None = None


@dataclass(frozen=True)
class ComparedArm:
    """One arm of a comparison.

    options: its option on each axis.
    config: its resolved config.
    solved: the knobs that were turned to match its size.
    """

    options: Arm
    config: Tree
    solved: frozenset[str] = frozenset()

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The values of the config by dotted key, without layers and seeds."""
        tree = result_config(self.config)
        tree.pop("seed_everything", None)
        found = dict(_flattened(tree, ""))
        found.pop(f"{TASK_OPTIONS}seed", None)
        return found

    @cached_property
    def layers(self) -> list[tuple[str, Tree]]:
        """The name and the fields of every layer, children included."""
        network = (self.config.get("model") or {}).get("network") or {}
        return [*layers_of(network.get("layers"))]

    def values(self, name: str) -> list[Any]:
        """The values of a field in its layers, each once."""
        return _field_values(self.layers, name)


def layers_of(specs: Any) -> Iterator[tuple[str, Tree]]:
    """The name and the fields of every layer in specs, children included."""
    if isinstance(specs, str):
        yield specs, {}
    elif isinstance(specs, Mapping) and "name" in specs:
        fields = {name: x for name, x in specs.items() if name not in ("name", "children")}
        yield specs["name"], fields
        yield from layers_of(specs.get("children"))
    else:
        inner = specs.values() if isinstance(specs, Mapping) else specs or ()
        for spec in inner:
            yield from layers_of(spec)


def _flattened(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key != LAYERS:
            yield from _flattened({**value}, f"{key}.")
        elif key != LAYERS:
            yield key, value


def _field_values(layers: Iterable[tuple[str, Tree]], name: str) -> list[Any]:
    """The values of a field, each once. A layer with a shell has none of a shell's field that it
    lacks."""
    found = []
    for _, fields in layers:
        if name in fields or (name in SHELL_FIELDS and _has_shell(fields)):
            value = fields.get(name)
            value = "none" if value is None or value is False else value
            found += [] if value in found else [value]
    return found


def _has_shell(fields: Tree) -> bool:
    return not fields.keys().isdisjoint(SHELL_FIELDS)


def config_differences(first: ComparedArm, second: ComparedArm) -> list[ConfigDifference]:
    """Where the configs of two arms differ."""
    a, b = first.keys, second.keys
    found = [
        ConfigDifference(key, (a.get(key), b.get(key)))
        for key in dict.fromkeys((*a, *b))
        if a.get(key) != b.get(key)
    ]
    if any(each.name == TASK_CLASS for each in found):  # another task has other options
        found = [each for each in found if not each.name.startswith(TASK_OPTIONS)]
    return [*found, *_layer_differences(first.layers, second.layers)]


def _layer_differences(
    a: list[tuple[str, Tree]], b: list[tuple[str, Tree]]
) -> Iterator[ConfigDifference]:
    names = [name for name, _ in a], [name for name, _ in b]
    if names[0] != names[1]:
        yield ConfigDifference(LAYERS, names)
    common = [name for name in dict.fromkeys(names[0]) if name in names[1]]
    for one in common:
        ours, others = ([x for x in side if x[0] == one] for side in (a, b))
        for name in dict.fromkeys(name for _, fields in (*ours, *others) for name in fields):
            if [f.get(name) for _, f in ours] != [f.get(name) for _, f in others]:
                yield _field_difference(name, ours, others)
    ours, others = ([x for x in side if x[0] not in common] for side in (a, b))
    if all(any(_has_shell(fields) for _, fields in side) for side in (ours, others)):
        for name in SHELL_FIELDS:
            one, other = _field_values(ours, name), _field_values(others, name)
            if any(x not in other for x in one) or any(x not in one for x in other):
                yield _field_difference(name, ours, others)


def _field_difference(
    name: str, a: list[tuple[str, Tree]], b: list[tuple[str, Tree]]
) -> ConfigDifference:
    first, second = (frozenset(x for x, fields in side if name in fields) for side in (a, b))
    return ConfigDifference(
        name, (_field_values(a, name), _field_values(b, name)), (first, second)
    )


class WrittenKeys(NamedTuple):
    """What overrides set.

    keys: dotted keys of the config; each stands for all that is below it, too.
    fields: pairs (layer, field); the layer is empty if the override names no layer.
    """

    keys: frozenset[str]
    fields: frozenset[tuple[str, str]]

    def has(self, difference: ConfigDifference, side: int) -> bool:
        """Whether it sets the value of one arm (side 0 or 1). A field has to be set in every layer
        that has it."""
        name = difference.name
        if difference.owners is None:
            return any(f"{name}.".startswith(f"{key}.") for key in self.keys)
        owners = difference.owners[side]
        return bool(owners) and all({(x, name), ("", name)} & self.fields for x in owners)


def keys_written(overrides: Iterable[Override]) -> WrittenKeys:
    keys, fields = set[str](), set[tuple[str, str]]()
    for _, key, value in overrides:
        if key.startswith(f"{LAYERS}."):
            fields.add(("", key.rpartition(".")[2]))
            continue
        keys.add(key)
        if f"{LAYERS}.".startswith(f"{key}."):
            for part in LAYERS.split(".")[key.count(".") + 1 :]:
                value = value.get(part) if isinstance(value, Mapping) else None
            fields |= {(layer, name) for layer, own in layers_of(value) for name in own}
    return WrittenKeys(frozenset(keys), frozenset(fields))


def axis_subject(axis: Axis) -> WrittenKeys:
    """What an axis is about: all its options set it, apart from options that set nothing. If only
    one option sets anything, and that sets several keys, no one knows which of them is meant."""
    setting = [option.overrides for option in axis.options.values() if option.overrides]
    if not setting or (len(setting) == 1 and len(setting[0]) > 1):
        return WrittenKeys(frozenset(), frozenset())
    each = [keys_written(overrides) for overrides in setting]
    anywhere = (frozenset(field for field in one.fields if not field[0]) for one in each)
    return WrittenKeys(
        frozenset.intersection(*(one.keys for one in each)), frozenset.intersection(*anywhere)
    )


def classified_differences(
    axes: Mapping[str, Axis], tuned: WrittenKeys, first: ComparedArm, second: ComparedArm
) -> list[tuple[ConfigDifference, DifferenceKind]]:
    """What differs between two arms of a grid, each with its kind.

    Args:
        axes: those of the grid.
        tuned: what the grid's tuning sets.
        first, second: the arms.
    """
    arms = first.options, second.options
    differing = [axis for axis in axes if arms[0].get(axis) != arms[1].get(axis)]
    meant = [axis_subject(axes[axis]) for axis in differing if all(axis in arm for arm in arms)]
    own = [
        keys_written(
            override
            for axis in differing
            if axis in arm
            for override in axes[axis].options[arm[axis]].overrides
        )
        for arm in arms
    ]
    found = config_differences(first, second)
    names = {each.name for each in found}

    def kind(each: ConfigDifference) -> DifferenceKind:
        wrote = [own[n].has(each, n) for n in (0, 1)]
        both = all(wrote[n] or (each.owners is not None and not each.owners[n]) for n in (0, 1))
        if (
            any(one.has(each, n) for one in meant for n in (0, 1))
            or (both and each.owners is not None and LAYERS not in names)
            or (any(wrote) and len(names) == 1)
            or (each.name == VOCABULARY_SIZE and any(name.startswith("data.") for name in names))
        ):
            return "implied"
        knob = each.name.rpartition(".")[2]
        solved = knob in first.solved or knob in second.solved
        return "told" if both or solved or tuned.has(each, 0) else "hidden"

    return [(each, kind(each)) for each in found]
