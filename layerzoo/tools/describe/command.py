"""`layerzoo describe --config NAME | --network YAML`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerzoo.model import ModelConfig
from layerzoo.spec import SpecError, error_at, plain
from layerzoo.support.arguments import PICTURES, CommandParser, check_file
from layerzoo.support.json_files import write_json
from layerzoo.tools.describe import report

from .costs import PartCost, cost, full_attention, layer_parts, on_meta, other_parts, title

DTYPES = {"float32": 4, "bfloat16": 2}
LENGTH = 4096
LENGTHS = tuple(2**n for n in range(10, 21))
NETWORK = "model.network"


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and the fields of the network that override the config's."""
    parser = CommandParser(
        "layerzoo describe",
        description="A model's parameters, FLOPs and state, beside full attention.",
        epilog="--model.network.FIELD VALUE overrides a field of the config, as in `fit`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="NAME", help="describe the model of this config, shipped or a file")
    add("--network", metavar="YAML", help="set the model's fields, beside a config or without")
    add(
        "--length", metavar="T", type=int, help="count for T tokens (default: the data's, or 4096)"
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="hold caches in this type; memories are in float32",
    )
    add("--json", metavar="FILE", type=Path, help="write all figures")
    add("--plot", metavar="FILE", type=Path, help="draw state and FLOPs against T")
    options, rest = parser.parse_known_args(argv)
    fields = {}
    for name, value in pairs(rest):
        if not name.startswith(f"--{NETWORK}."):
            raise SpecError(parser.no_option(name, f"--{NETWORK}."))
        fields[name.removeprefix("--")] = parse(name, value)
    if options.network is not None:
        network = parse("--network", options.network)
        if not isinstance(network, dict):
            raise SpecError(
                f"--network: expected fields, {{vocab_size: 256, ..}}, got {network!r}"
            )
        fields = {f"{NETWORK}.{name}": value for name, value in network.items()} | fields
    if options.config is None and options.network is None:
        raise SpecError("describe: needs --config NAME or --network '{vocab_size: 256, ..}'")
    if options.length is not None and options.length < 1:
        raise SpecError(f"--length: must be at least 1, got {options.length}")
    return options, fields


def pairs(rest: Sequence[str]) -> list[tuple[str, str]]:
    """--name value and --name=value."""
    found, words = [], iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        value = value if equals else next(words, None)
        if value is None and word.startswith("--"):
            raise SpecError(f"{name}: expected a value")
        found.append((name, value))
    return found


def parse(place: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{place}: is not YAML: {' '.join(str(error).split())}") from None


def read_network(config: str | None, fields: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The model's config, and the length of the config's data."""
    from layerzoo.support.yaml_files import config_path, read_yaml

    tree = read_yaml(config_path(config)) if config else OmegaConf.create()
    try:
        for name, value in fields.items():
            OmegaConf.update(tree, name, value, merge=False, force_add=True)
        length = OmegaConf.select(tree, "data.init_args.length", default=LENGTH)
        network = OmegaConf.select(tree, NETWORK)
        network = OmegaConf.to_container(network, resolve=True) if network is not None else None
    except OmegaConfBaseException as error:
        raise SpecError(f"{NETWORK}: {str(error).splitlines()[0]}") from None
    if not isinstance(network, dict):
        raise SpecError(f"--config {config}: has no {NETWORK}")
    with error_at(NETWORK):
        return ModelConfig.from_fields({str(k): v for k, v in network.items()}), length


def figures(config: ModelConfig, length: int, dtype: str = "float32") -> dict[str, Any]:
    """All that the command says, in plain types but for `PartCost` and `Cost`."""
    size = DTYPES[dtype]
    with error_at(NETWORK):
        model, full = on_meta(config), on_meta(full_attention(config))
    layers, others = layer_parts(model, length, size), other_parts(model, length, size)
    lengths = sorted({*LENGTHS, length})
    return {
        "length": length,
        "dtype": dtype,
        "counting": " ".join(report.RULES.format(dtype=dtype).split()),
        "blocks": [
            {"layer": title(spec), "spec": plain(spec), "figures": part}
            for (_, spec), part in zip(config.blocks(), layers, strict=True)
        ],
        "others": others,
        "total": sum([*layers, *others.values()], PartCost()),
        "lengths": [(cost(model, T, size), cost(full, T, size)) for T in lengths],
    }


def main(argv: Sequence[str]) -> int:
    options, fields = arguments(argv)
    check_file("--json", options.json)
    check_file("--plot", options.plot, PICTURES)
    config, length = read_network(options.config, fields)
    found = figures(config, options.length or length, options.dtype)
    name = options.config or "this model"
    print(f"{name}: depth {config.depth}, dim {config.dim}, vocabulary {config.vocab_size:,}\n")
    print(report.text(found))
    if options.json:
        write_json(options.json, report.to_json(found))
    if options.plot:
        from .plot import plot

        plot(name, found, options.plot)
    return 0
