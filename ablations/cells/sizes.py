"""The sizes of a config's model, and the knobs in the config that change them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from layerzoo.model import ModelConfig
from layerzoo.registry import get_layer
from layerzoo.spec import SpecError

from . import configs
from .configs import Tree

SizeName = Literal["parameters", "flops", "state_bytes"]


class Sizes(NamedTuple):
    """parameters; flops: of the forward pass, a token; state_bytes: after `length` tokens;
    memory_bytes: of these what is no buffer."""

    parameters: int
    flops: float
    state_bytes: int
    memory_bytes: int
    length: int

    @property
    def named(self) -> dict[str, float]:
        """As metrics.json names them."""
        figures = (self.parameters, self.state_bytes, self.memory_bytes, self.flops)
        return dict(zip(SIZE_NAMES, figures, strict=True))


SIZE_NAMES = ("parameters", "state_bytes", "state_bytes_memory", "flops_per_token")


def measure_sizes(config: Tree, length: int | None = None) -> Sizes:
    """Build the model, without memory for its weights.

    Args:
        length: T in place of the task's own.

    Raises:
        SpecError: it does not build.
    """
    T = configs.task_of(config).length if length is None else length
    model = configs.model_of(config)
    state = model.state_bytes(T)
    return Sizes(
        sum(p.numel() for p in model.parameters()),
        model.flops_per_token(T),
        state.total,
        state.memory,
        T,
    )


def sizes_of(config: Tree, length: int | None = None) -> Sizes:
    """`measure`, once for each network and length."""
    T = configs.task_of(config).length if length is None else length
    found = _cached_sizes(json.dumps(config["model"]["network"]), T)
    if isinstance(found, str):
        raise SpecError(found)
    return found


@functools.cache
def _cached_sizes(network: str, T: int) -> Sizes | str:
    try:
        return measure_sizes({"model": {"network": json.loads(network)}}, T)
    except SpecError as error:
        return str(error)


NETWORK_KNOBS = ("dim", "mlp")
"""Those of the network; the others are fields of its layers."""


@functools.cache
def _whole_number_fields(layer: str) -> dict[str, Any]:
    """The whole-numbered fields of a layer and their defaults."""
    config = get_layer(layer).Config
    hints = get_type_hints(config)
    return {
        field.name: field.default
        for field in config.fields()
        if int in (hints[field.name], *get_args(hints[field.name]))
    }


def _opened(network: Tree) -> tuple[Tree, list[Tree]]:
    """A copy whose specs are all mappings, and these: of layers, children and overrides."""
    network, found = copy.deepcopy(network), []

    def opened(spec: Any) -> Tree:
        spec = {"name": spec} if isinstance(spec, str) else spec
        found.append(spec)
        if "children" in spec:
            spec["children"] = [opened(child) for child in spec["children"]]
        return spec

    for name in ("layers", "overrides"):
        specs = network.get(name)
        if isinstance(specs, Mapping):
            network[name] = {key: opened(spec) for key, spec in specs.items()}
        elif specs is not None:
            network[name] = [opened(spec) for spec in specs]
    return network, found


def _specs_with(specs: list[Tree], knob: str) -> Iterator[Tree]:
    """The specs of layers that have such a field; of overrides, those that set it."""
    return (s for s in specs if knob in (_whole_number_fields(s["name"]) if "name" in s else s))


def layer_knobs(config: Tree) -> set[str]:
    """The whole-numbered fields of the layers."""
    _, specs = _opened(config["model"]["network"])
    return set[str]().union(
        *(_whole_number_fields(spec["name"]) for spec in specs if "name" in spec)
    )


def knob_start(config: Tree, knob: str) -> int | None:
    """A value to begin with; None if there is no such knob."""
    network = config["model"]["network"]
    if knob in NETWORK_KNOBS:
        built = ModelConfig.from_fields(network)
        return built.dim if knob == "dim" else round(built.mlp * built.dim)
    having = [*_specs_with(_opened(network)[1], knob)]
    values = (
        s.get(knob, _whole_number_fields(s["name"])[knob] if "name" in s else None) for s in having
    )
    return next((v for v in values if isinstance(v, int)), 1) if having else None


def with_knob(config: Tree, knob: str, value: int) -> tuple[Tree, float]:
    """The config with a knob at a value, and what the config says for it: `mlp` is searched by
    hidden width and set by multiple."""
    network, specs = _opened(config["model"]["network"])
    setting: float = value
    if knob == "dim":
        network["dim"] = value
    elif knob == "mlp":
        setting = network["mlp"] = value / ModelConfig.from_fields(network).dim
    else:
        for spec in _specs_with(specs, knob):
            spec[knob] = value
    return {**config, "model": {**config["model"], "network": network}}, setting


def layer_names(config: Tree) -> tuple[str, ...]:
    """The layers of the network, children too, each once."""
    _, specs = _opened(config["model"]["network"])
    return tuple(sorted({spec["name"] for spec in specs if "name" in spec}))
