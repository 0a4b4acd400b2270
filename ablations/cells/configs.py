"""A training config as a plain tree: resolved, checked, and what it builds, without training."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch
from lightning import Trainer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerzoo.data import Task
from layerzoo.layer import EXECUTION
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.spec import SpecError, error_at, plain, required, suggest
from layerzoo.support.error_lines import spec_error
from layerzoo.train.lit import LitModel, initial_weights
from layerzoo.train.module import TaskModule
from layerzoo.train.parser import TrainingParser, check_trainer
from layerzoo.train.trained_on import digest_weights

Tree = dict[str, Any]

SECTIONS = ("seed_everything", "trainer", "model", "data")

_tasks: dict[str, tuple[Tree, Task]] = {}
_options_checked: dict[str, Tree] = {}


def resolve(config: Tree) -> Tree:
    """A training config with its interpolations resolved, and with every option of the module, the
    network, its layers and the task, so that another default later changes no cell. Before and
    after it is a tree of plain containers. An interpolation may name an option that the config
    leaves at its default.

    Raises:
        SpecError: an interpolation that names nothing, an unknown option, a task that refuses its
            options.
    """
    for name in config:
        if name not in SECTIONS:
            raise SpecError(f"{name}: no such section; {suggest(name, SECTIONS)}")
    for section, options in _training_parser()[1].items():
        found = config.get(section, {})
        if not isinstance(found, dict):
            raise SpecError(f"{section}: expected a mapping of options, got {found}")
        for name in found:
            if name not in options:
                raise SpecError(f"{section}.{name}: no such option; {suggest(name, options)}")
    written = config.get("data")
    if not isinstance(written, dict) or "class_path" not in written:
        raise SpecError("data: expected class_path and init_args")
    if not isinstance(options := written.get("init_args") or {}, dict):
        raise SpecError(f"data.init_args: expected a mapping of options, got {options}")
    try:
        whole = OmegaConf.create(config)
        data: Any = OmegaConf.to_container(whole.data, resolve=True)
        defaults, _ = _options_and_task(data)
        defaults = {name: value for name, value in defaults.items() if name != "seed"}
        whole.data.init_args = {**(data.get("init_args") or {}), **defaults}
        tree: Any = OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException as error:
        raise SpecError(str(error).splitlines()[0]) from None
    for name in ("devices", "num_nodes"):
        if (value := tree.get("trainer", {}).get(name)) not in (None, 1, "1", "auto"):
            raise SpecError(f"trainer.{name}: {value}, but a cell runs on one device; drop it")
    tree |= _checked_sections(tree)
    data = {**data, "init_args": {**plain(defaults), **(data.get("init_args") or {})}}
    return {**tree, "model": _completed_module(tree), "data": data}


def _completed_module(tree: Tree) -> Tree:
    """The section of the module, with the options that it leaves at their defaults."""
    known = LitModel.Config.fields()
    defaults = {
        f.name: plain(f.default) for f in known if not required(f) and f.name not in EXECUTION
    }
    written = tree.get("model") or {}
    with error_at("model.network"):
        network = network_of(written).to_fields()
    return {**defaults, **written, "network": network}


def network_of(options: Tree) -> ModelConfig:
    """The network of the module's options.

    Raises:
        SpecError: it is none, or one of its fields is not right.
    """
    written = options.get("network")
    if not isinstance(written, dict):
        raise SpecError("expected the fields of a language model")
    return ModelConfig.from_fields({str(name): value for name, value in written.items()})


def _checked_sections(tree: Tree) -> Tree:
    """The sections of the trainer and of the module, as training reads them: checked, and with a
    number for the text of one."""
    written = {name: dict(tree[name]) for name in ("trainer", "model") if tree.get(name)}
    options = {name: {**part} for name, part in written.items()}
    options.get("model", {}).pop("network", None)  # `model` builds it
    key = json.dumps(options, sort_keys=True, default=str)
    if key not in _options_checked:
        _options_checked[key] = _values_of_texts(options)
    for section, values in _options_checked[key].items():
        written[section] |= values
    return written


def _values_of_texts(options: Tree) -> Tree:
    """The values that were written as text and that training reads as something else.

    Raises:
        SpecError: an option of another type, or out of its range.
    """
    parser, _ = _training_parser()
    parsed = parser.parse_object(copy.deepcopy(options)).as_dict()
    check_trainer(parsed["trainer"])
    fields = {field.name for field in TaskModule.Config.fields()}
    TaskModule(**{name: value for name, value in parsed["model"].items() if name in fields})
    return {
        section: {
            name: parsed[section][name]
            for name, value in part.items()
            if isinstance(value, str) and not isinstance(parsed[section][name], str)
        }
        for section, part in options.items()
    }


@cache
def _training_parser() -> tuple[TrainingParser, dict[str, list[str]]]:
    """The parser of the trainer's and the module's options, and their names by section."""
    parser = TrainingParser(exit_on_error=False)
    trainer = parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    model = parser.add_class_arguments(LitModel, "model", skip={"network"}, instantiate=False)
    names = {"trainer": trainer, "model": [*model, "model.network"]}
    return parser, {
        section: [name.removeprefix(f"{section}.") for name in added]
        for section, added in names.items()
    }


def task_of(config: Tree) -> Task:
    """The task of a resolved config; its seed may be another's."""
    return _options_and_task(config["data"])[1]


def _options_and_task(data: Tree) -> tuple[Tree, Task]:
    """All options of a task, defaults too, and the task."""
    options = {n: v for n, v in (data.get("init_args") or {}).items() if n != "seed"}
    data = {"class_path": data["class_path"], "init_args": options}
    key = json.dumps(data, sort_keys=True, default=str)
    if key not in _tasks:  # parsing takes a tenth of a second, and grids repeat it
        _tasks[key] = _build_task(data)
    return _tasks[key]


def _build_task(data: Tree) -> tuple[Tree, Task]:
    parser = TrainingParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "data", required=True)
    parsed = parser.parse_object({"data": copy.deepcopy(data)})  # it changes what it is given
    try:
        built = parser.instantiate(parsed).data
    except ValueError as error:  # the parser's, around the task's own
        raise (spec_error(error) or error) from None
    return parsed.data.init_args.as_dict(), built


def forget_tasks() -> None:
    """The tasks that were built: what they read may have changed since."""
    _tasks.clear()


def digests_of(config: Tree) -> dict[str, str]:
    """Of what a run of a resolved config would read now, see `layerzoo.train.trained_on.digests`.

    Raises:
        SpecError: it cannot be read, or the weights to start from are of another network.
    """
    _, fresh = _build_task(config["data"])
    found = {f"data.{option}": digest for option, digest in fresh.digest().items()}
    init, network = config["model"].get("init"), config["model"]["network"]
    if init is not None:
        with error_at("model.init"):
            weights = initial_weights(init, ModelConfig.from_fields(network))
        found["model.init"] = digest_weights(weights)
    return found


def model_of(config: Tree) -> LanguageModel:
    """The model of a resolved config, without memory for its weights.

    Raises:
        SpecError: it does not build.
    """
    with error_at("model.network"), torch.device("meta"):
        return LanguageModel(network_of(config.get("model") or {}))
