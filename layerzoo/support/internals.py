"""The private names of other libraries that layerzoo needs. All of them are in this file.

A new version of a library may rename them. `tests/test_internals.py` then says which one it lacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

NAMES = {
    "lightning": (
        "Trainer._logger_connector",
        "Trainer.fit_loop._data_fetcher",
        "Trainer.fit_loop._load_combined_loader_states",
        "Trainer.fit_loop._should_accumulate",
        "Trainer.fit_loop.epoch_loop._batches_that_stepped",
        "Trainer.fit_loop.epoch_loop._should_accumulate",
        "Trainer.fit_loop.epoch_loop._should_check_val_fx",
        "LightningCLI._get",
        "LightningCLI._parse_ckpt_path",
    ),
    "jsonargparse": (
        "ArgumentParser._actions",
        "ArgumentParser._subcommands_action",
        "ArgumentParser._subcommands_action._name_parser_map",
        "ArgumentParser._actions[Union]._typehint",
    ),
    "argparse": ("ArgumentParser._actions", "_SubParsersAction"),
    "transformers": ("LlamaConfig._attn_implementation",),
    "ray": ("ray._private.worker._worker_logs_enabled",),
}
"""By library: where each name is found."""


# Lightning


def load_loader_states(fit_loop: Any) -> None:
    """Put the states of a checkpoint into the loaders of a fit loop, now."""
    fit_loop._load_combined_loader_states()


def accumulates(loop: Any) -> bool:
    """Whether the batch that a fit loop, or its epoch loop, has run ends no optimiser step."""
    return loop._should_accumulate()


def validation_is_due(trainer: Any) -> bool:
    """Whether a validation follows the batch that has run."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def logged(trainer: Any) -> Any:
    """The connector of the loggers, which holds what is logged after a batch."""
    return trainer._logger_connector


def logged_step(trainer: Any) -> int:
    """The step that figures are logged at."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: Any, step: int) -> None:
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def cli_option(cli: Any, name: str) -> Any:
    """An option of the subcommand that a LightningCLI runs."""
    return cli._get(cli.config, name)


def reads_checkpoints(cls: Any) -> Any:
    """Make a LightningCLI call its `read_checkpoint`, after parsing, in place of Lightning's."""
    cls._parse_ckpt_path = cls.read_checkpoint
    return cls


# argparse and jsonargparse


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser."""
    return parser._actions


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the subcommands, by name."""
    of_jsonargparse = getattr(parser, "_subcommands_action", None)
    if of_jsonargparse is not None:
        return of_jsonargparse._name_parser_map
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: sub for group in groups for name, sub in group.choices.items()}


def all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a parser and of its subcommands."""
    yield from parser._actions
    for sub in subparsers(parser).values():
        yield from all_actions(sub)


def type_of(action: argparse.Action) -> Any:
    """The type that jsonargparse reads the value of an option as; None of other options."""
    return getattr(action, "_typehint", None)


def set_type(action: argparse.Action, kind: Any) -> None:
    vars(action)["_typehint"] = kind


# transformers


def attention_function(config: Any) -> str:
    """The name of the function by which a model attends."""
    return config._attn_implementation


# Ray


def silence_workers(ray: Any) -> None:
    """Keep the logs of Ray's workers off our output."""
    ray._private.worker._worker_logs_enabled = False
