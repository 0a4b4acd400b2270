"""The argument parser of our own subcommands."""

from __future__ import annotations

import argparse
from typing import NoReturn

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
