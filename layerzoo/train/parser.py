"""The parser of the training commands, and the checks of the trainer's options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import Any, NoReturn, get_args, get_type_hints

from lightning.pytorch.cli import LightningArgumentParser

from layerzoo.data import list_tasks
from layerzoo.spec import Config, SpecError, error_at, suggest
from layerzoo.support import error_lines, internals
from layerzoo.support.arguments import OneLine
from layerzoo.support.configured import Configured
from layerzoo.support.field_docs import field_docs

MINIMUM = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "check_val_every_n_epoch": 1}
MINIMUM |= {"max_steps": -1, "max_epochs": -1, "num_sanity_val_steps": -1}
"""The least values of options of the trainer. Lightning does not check most of them."""
SHARES = {f"limit_{split}_batches": 0 for split in ("train", "val", "test", "predict")}
SHARES |= {"overfit_batches": 0, "val_check_interval": 1}
"""Options that are a number of batches, with the least one; a float is a share of all batches."""

WANTED = {
    r"Expected a <class '[\w.]*\bSequence'>": "expected a list",
    r"Expected a <class '(\w+)'>": r"expected \1",
    r"Expected a tuple with (\d+) elements": r"expected a list of \1",
    r"\. Got value: ": ", got ",
}
"""What jsonargparse says of a value of another type, and what we say."""


class TrainingParser(OneLine, LightningArgumentParser):
    """Reports an error as a SpecError of one line, and takes the help of an option from the
    docstring of its field."""

    configs: Mapping[str, type[Config]] = MappingProxyType({})
    """The configs whose fields are options, by what is before the field's name."""

    def add_class_arguments(
        self, class_type: Any, nested_key: str | None = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """As jsonargparse's, but 4 is a number of batches, and never the share 4.0.

        Its type may have become `Union[float, int, None]`: typing takes the orders of a union for
        equal, and answers with the one that any module has used first.
        """
        added = super().add_class_arguments(class_type, nested_key, *args, **kwargs)
        for action in internals.actions(self):
            kinds = get_args(internals.type_of(action))
            if int in kinds and float in kinds:
                others = [kind for kind in kinds if kind not in (int, float)]
                internals.set_type(action, reduce(or_, others, int | float))
        config = class_type.Config if issubclass(class_type, Configured) else class_type
        if issubclass(config, Config):
            prefix = f"{nested_key}." if nested_key else ""
            self.configs = {**self.configs, prefix: config}
            for name, hint in get_type_hints(config).items():
                if isinstance(hint, type) and issubclass(hint, Config):
                    self.configs = {**self.configs, f"{prefix}{name}.": hint}
        return added

    def format_help(self, *args: Any, **options: Any) -> str:
        known = {action.dest: action for action in internals.actions(self)}
        for prefix, config in self.configs.items():
            for name, doc in field_docs(config).items():
                if action := known.get(prefix + name):
                    action.help = doc
        return super().format_help(*args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.search(r'Parser key "([^"]+)"', message)
        place = f"{key[1]}: " if key else ""
        unknown = re.search(
            r"unrecognized arguments: --(\S+)|not accept option '(\S+)'|Option '(\S+)' is not",
            message,
        )
        path = re.search(r"Expected a dot import path string: (\S+)", message)
        if cause := error_lines.spec_error(ex):
            raise SpecError(f"{place}{cause}") from None
        if unknown:
            word = next(filter(None, unknown.groups())).split("=")[0]
            raise SpecError(f"{place}{self.no_option(word)}") from None
        if path and place in ("", "data: "):
            known = [cls.__name__ for cls in list_tasks()]
            raise SpecError(f"{place}no task '{path[1]}'; {suggest(path[1], known)}") from None
        if path:
            way = "give an import path such as package.module.Class"
            raise SpecError(f"{place}no class '{path[1]}'; {way}") from None
        if error_lines.UNION in message:
            message = error_lines.plain_union(message)
        if choices := re.search(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", message):
            known = re.findall(r"'([^']*)'", choices[1])
            way = f"one of {choices[1]}, got '{choices[2]}'; {suggest(choices[2], known)}"
            raise SpecError(f"{place}expected {way}") from None
        text = re.sub(r'^Parser key "[^"]+":', "", message.strip()).strip().splitlines()[0]
        for wanted, words in WANTED.items():
            text = re.sub(wanted, words, text)
        raise SpecError(f"{place}{text}") from None


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse options of the trainer that are of the right type and out of their range, before
    anything is built.

    Raises:
        SpecError: names the option.
    """
    for name, value in options.items():
        with error_at(f"trainer.{name}"):
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"must be finite, got {value}")
            if value is None:
                continue
            if name in MINIMUM and value < MINIMUM[name]:
                raise SpecError(f"must be at least {MINIMUM[name]}, got {value}")
            if name in SHARES and isinstance(value, int | float):
                low, share = SHARES[name], isinstance(value, float)
                if not (0 <= value <= 1 if share else value >= low):
                    way = f"batches, {low} or more, or a share of them, a float in [0, 1]"
                    raise SpecError(f"must be a number of {way}; got {value}")
