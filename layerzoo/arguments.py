"""The arguments of our own subcommands: the parser, and specs of layers."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import yaml

from layerzoo.layer import check_spec
from layerzoo.spec import SpecError, suggest


class Parser(argparse.ArgumentParser):
    """Bad options are a `SpecError`, as all bad input is, behind the subcommand's name."""

    missing: str | None = None
    """What to say where a required argument is missing."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if self.missing and "arguments are required" in message:
            message = self.missing
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown and unknown[0].startswith("--"):
            word = unknown[0].partition("=")[0]
            known = (o for action in self._actions for o in action.option_strings)
            message = f"{word}: no such option; {suggest(word, known)}"
        raise SpecError(f"{self.prog.split()[1]}: {message}")


def integers(text: str) -> list[int]:
    """Numbers separated by commas."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers, as in 1,2, got '{text}'") from None


def spec_of(text: str) -> dict[str, Any]:
    """A layer's name, or its spec in YAML."""
    if not text.lstrip().startswith("{"):
        return {"name": text}
    try:
        spec = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"NAME {text}: not YAML; write '{{name: linear, heads: 2}}'") from None
    check_spec(spec)
    return spec
