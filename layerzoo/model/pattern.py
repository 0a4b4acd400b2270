"""Which spec every block of a model runs: specs tiled over depth, and the exceptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from layerzoo.layer import Layer
from layerzoo.registry import check_spec, full_spec
from layerzoo.spec import SpecError, error_at, plain, suggest

Placed = tuple[str, Any]
"""A spec, behind the place where the user wrote it."""
DEEPEST = 10_000
"""Blocks of a model at most: each is listed before it is built."""


def tiled(
    layers: Sequence[Any] | Mapping[str, Any], pattern: str | None, depth: int
) -> list[Placed]:
    """The spec of every block, from a list of specs, or from specs by name and a pattern of the
    names, both tiled over the depth: ``{a: .., b: ..}`` and ``"a*3 b"`` are a a a b a a a b ..

    Raises:
        SpecError: a pattern without names or names without one, an unknown name, or more specs
            than blocks.
    """
    if isinstance(layers, Mapping):
        names = order(layers, pattern)
        what, cycle = "pattern", [(f"layers.{name}", layers[name]) for name in names]
    elif pattern is not None:
        raise SpecError("pattern: needs layers by name, {a: .., b: ..}; or leave it out (null)")
    else:
        what, cycle = "layers", [(f"layers[{n}]", spec) for n, spec in enumerate(layers)]
    if not 1 <= len(cycle) <= depth:
        raise SpecError(f"{what}: needs 1 to depth={depth} specs to tile, got {len(cycle)}")
    return [cycle[n % len(cycle)] for n in range(depth)]


def check_blocks(
    layers: Sequence[Any] | Mapping[str, Any],
    pattern: str | None,
    depth: int,
    overrides: Mapping[int, Any],
) -> None:
    """Check every spec, used or not, without building anything.

    Raises:
        SpecError: as `tiled`, `overridden` and `check_spec` do, behind the spec's place; or a
            built layer that more than one block would run.
    """
    base = tiled(layers, pattern, depth)
    blocks = overridden(base, overrides)
    named = layers.items() if isinstance(layers, Mapping) else ()
    specs = {f"layers.{name}": spec for name, spec in named} | dict(base) | dict(blocks)
    for place, spec in specs.items():
        with error_at(place):
            check_spec(spec)
    built = Counter(id(spec) for _, spec in blocks if isinstance(spec, Layer))
    for place, spec in blocks:
        if built[id(spec)] > 1:
            raise SpecError(f"{place}: a built layer cannot be tiled; give its spec, layer.spec()")


def order(layers: Mapping[str, Any], pattern: str | None) -> list[str]:
    """The names of a pattern, one by one."""
    if pattern is None:
        raise SpecError(
            "pattern: missing; layers by name need an order such as 'a*3 b' (and a single spec "
            "stands in a list)"
        )
    names: list[str] = []
    for word in pattern.split():
        name, star, times = word.partition("*")
        if name not in layers:
            raise SpecError(f"pattern: no layer '{name}'; {suggest(name, layers)}")
        if star and not (times.isdecimal() and len(times) < 10 and 1 <= int(times) <= DEEPEST):
            raise SpecError(f"pattern: '{word}': expected a count in [1, {DEEPEST}] after *")
        names += [name] * int(times or 1)
    return names


def overridden(blocks: Sequence[Placed], overrides: Mapping[int, Any]) -> list[Placed]:
    """The blocks with the exceptions in place: block index, from the end where it is negative,
    to fields that are merged over the block's spec, or to a whole spec that replaces it.

    Raises:
        SpecError: an index out of range or given twice, or fields for a layer that is built.
    """
    result, seen = list(blocks), {}
    for index, change in overrides.items():
        place = f"overrides[{index}]"
        with error_at(place):
            if not -len(result) <= index < len(result):
                raise SpecError(
                    f"no such block; there are 0 to {len(result) - 1}, or -1 to "
                    f"{-len(result)} from the end"
                )
            block = index % len(result)
            if block in seen:
                raise SpecError(f"is the same block as overrides[{seen[block]}]; give it once")
            seen[block] = index
            result[block] = place, merged(result[block][1], change)
    return result


def merged(spec: Any, change: Any) -> Any:
    """The spec with the fields of a change, or the change where it is a spec itself."""
    if is_spec(change):
        return change
    if not isinstance(change, Mapping):
        raise SpecError(f"expected fields, or a spec, got {change!r}")
    if isinstance(spec, Layer):
        raise SpecError("the block's layer is built and takes no fields; give a spec with a name")
    return {"name": spec, **change} if isinstance(spec, str) else {**spec, **change}


def completed(specs: Sequence[Any] | Mapping[Any, Any]) -> Any:
    """The specs with all their fields; of overrides, those that only merge fields as they are."""
    if not isinstance(specs, Mapping):
        return [full_spec(spec) for spec in specs]
    return {key: full_spec(spec) if is_spec(spec) else plain(spec) for key, spec in specs.items()}


def is_spec(change: Any) -> bool:
    """Whether it names a layer, and does not only give fields."""
    return isinstance(change, (str, Layer)) or (isinstance(change, Mapping) and "name" in change)


def block_indices(overrides: Mapping[Any, Any]) -> dict[int, Any]:
    """The overrides by integers: JSON, and flags of a command line, hold strings."""
    found: dict[int, Any] = {}
    for key, change in overrides.items():
        digits = key.removeprefix("-") if isinstance(key, str) else ""
        if type(key) is not int and not digits.isdecimal():
            raise SpecError(f"overrides[{key}]: expected the index of a block, such as 0 or -1")
        if int(key) in found:
            raise SpecError(f"overrides[{key}]: given twice")
        found[int(key)] = change
    return found
