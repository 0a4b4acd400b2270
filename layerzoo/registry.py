"""The registry of layers: discovery, specs, and build()."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from layerzoo.layer import REGISTERED, Layer
from layerzoo.spec import Config, Spec, SpecError, error_at, suggest

DISCOVER = ("layerzoo.model.compose", "layerzoo.memories", "layerzoo.attention")
ENTRY_POINTS = "layerzoo.layers"
_discovered = False


def discover() -> None:
    """Import every module that may hold a layer: of this package, and of the entry points."""
    global _discovered
    if _discovered:
        return
    for package in DISCOVER:
        module = importlib.import_module(package)
        for info in pkgutil.walk_packages(module.__path__, package + "."):
            importlib.import_module(info.name)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except (ImportError, AttributeError, TypeError) as error:
            owner = point.dist.name if point.dist else "an installed package"
            raise SpecError(
                f"entry point '{point.name} = {point.value}' of {owner} does not load: {error}; "
                f"mend or uninstall it"
            ) from error
    _discovered = True  # only now: a failed discovery must fail again, not list half a zoo


def list_layers(kind: str | None = None) -> list[str]:
    """The registered names, sorted; `kind` is memory, attention or composition."""
    discover()
    return sorted(name for name, cls in REGISTERED.items() if kind in (None, cls.kind))


def get_layer(name: str) -> type[Layer]:
    """The class registered as `name`.

    Raises:
        SpecError: no such layer.
    """
    discover()
    if not isinstance(name, str) or name not in REGISTERED:
        raise SpecError(f"unknown layer '{name}'; {suggest(name, REGISTERED)}")
    return REGISTERED[name]


def check_spec(spec: Spec | Layer, **fields: Any) -> tuple[type[Layer], Config]:
    """The class and config that a spec names, checked without building anything (or its dim)."""
    if isinstance(spec, Layer):
        return type(spec), spec.config
    if not isinstance(spec, (str, Mapping)):
        raise SpecError(f"a layer spec is a name or a mapping, got {spec!r}")
    merged = {"name": spec, **fields} if isinstance(spec, str) else {**spec, **fields}
    if "name" not in merged:
        raise SpecError(f"a layer spec needs a name, got {merged!r}")
    merged.pop("dim", None)
    cls = get_layer(merged.pop("name"))
    with error_at(cls.name):
        return cls, cls.Config.from_fields(merged)


def full_spec(spec: Spec | Layer) -> dict[str, Any]:
    """The spec with all fields of its config, and those of its children, in plain types: the same
    layer whatever becomes of a default."""
    cls, config = check_spec(spec)
    return {"name": cls.name, **config.to_fields()}


def build(spec: Spec | Layer, *, dim: int | None = None, **fields: Any) -> Layer:
    """Build a layer from its registered name or spec: ``build("linear", dim=256, heads=4)``,
    ``build({"name": "linear", "heads": 4}, dim=256)``. A layer that is already built is returned.

    Args:
        spec: name, or mapping of name and config fields (keywords win over the mapping's).
        dim: the model width D; a mapping may hold it too.
        fields: config fields of the layer.

    Raises:
        SpecError: unknown name or field, wrong type or value, or a dim that does not fit.
    """
    if isinstance(spec, Layer):
        if dim not in (None, spec.dim) or fields:
            raise SpecError(f"{spec.name}: already built with dim={spec.dim}; it takes no fields")
        return spec
    if isinstance(spec, Mapping) and "dim" in spec:
        spec = dict(spec)
        inner = spec.pop("dim")
        if dim not in (None, inner):
            raise SpecError(f"dim: {inner} in the spec contradicts {dim}")
        dim = inner
    cls, config = check_spec(spec, **fields)
    with error_at(cls.name):
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise SpecError(f"dim: expected a positive int, got {dim!r}")
        return cls(dim, config)
