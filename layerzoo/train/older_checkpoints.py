"""Reads networks of older checkpoints, whose specs left out fields that had their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerzoo.model import ModelConfig
from layerzoo.registry import get_layer


def of_today(network: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the fields of a network with the defaults of the time when it was saved.

    A checkpoint of before attention had the shell has `head_dim`, and true or false for its norm
    and gate. Those become today's fields. Attention had no norm of q and k by default then.

    Raises:
        SpecError: a layer or a field that is unknown, or a value that is refused.
    """
    found = dict(network)
    for name in ("layers", "overrides"):
        specs = found.get(name)
        if isinstance(specs, Mapping):
            found[name] = {key: _spec(spec) for key, spec in specs.items()}
        elif specs is not None:
            found[name] = [_spec(spec) for spec in specs]
    return ModelConfig.from_fields(found).to_fields()


def _spec(spec: Any) -> Any:
    named: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "children" in named:
        named["children"] = [_spec(child) for child in named["children"]]
    if "name" not in named:  # fields that are merged over a spec
        return _renamed(named)
    fields = {field.name for field in get_layer(named["name"]).Config.fields()}
    if "key_heads" in fields:  # a memory, whose defaults were those of today
        return named
    before = {name: False for name in ("qk_norm", "out_gate") if name in fields}
    return _renamed({**before, **named})


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    words = {"qk_norm": ("none", "rms"), "out_gate": ("none", "sigmoid")}
    for name, (off, on) in words.items():
        if isinstance(fields.get(name), bool):
            fields[name] = on if fields[name] else off
    if (width := fields.pop("head_dim", None)) is not None:
        maps = getattr(get_layer(fields["name"]), "maps", 1) if "name" in fields else 1
        fields |= {"key_dim": width, "value_dim": maps * width}
    return fields
