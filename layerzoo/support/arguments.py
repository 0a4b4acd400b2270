"""The arguments of our own subcommands: the parser, and specs of layers."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from layerzoo.registry import check_spec
from layerzoo.spec import SpecError, suggest
from layerzoo.support import internals


class OneLine:
    """What the parsers of all commands say of a word that they do not know."""

    def no_option(self, word: str, *more: str) -> str:
        """An unknown option, `--jbos`, or the key of one, `model.lrr`; and the nearest of the
        parser's options and of those that it does not know of."""
        parser: Any = self
        names = {*more}
        for action in internals.all_actions(parser):
            if action.dest != "help":
                names |= {*action.option_strings} if word.startswith("--") else {action.dest}
        return f"{word}: no such option; {suggest(word, names)}"


class CommandParser(OneLine, argparse.ArgumentParser):
    """Bad options are a `SpecError`, as all bad input is, behind the subcommand's name."""

    missing: str | None = None
    """What to say where a required argument is missing."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if self.missing and "arguments are required" in message:
            message = self.missing
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown and unknown[0].startswith("--"):
            message = self.no_option(unknown[0].partition("=")[0])
        choice = re.match(r"(\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[^\s',]+", choice[3])
            message = f"{choice[1]}: no '{choice[2]}'; {suggest(choice[2], known)}"
        raise SpecError(f"{' '.join(self.prog.split()[1:])}: {message}")


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


PICTURES = (".png", ".svg", ".pdf")
"""What matplotlib draws by the name's end."""


def check_file(option: str, path: str | Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse, before the time is spent, a file that cannot be written after it.

    Args:
        suffixes: how its name may end, if not in any way.

    Raises:
        SpecError: it cannot be written; what stands there is left as it is.
    """
    if path is None:
        return
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise SpecError(f"{option} {path}: cannot draw this kind; use {', '.join(suffixes)}")
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
        tempfile.TemporaryFile(dir=path.parent).close()  # it is written beside, then renamed
    except OSError as error:
        raise SpecError(f"{option} {path}: cannot be written: {error.strerror}") from None


def check_folder(option: str, path: Path) -> None:
    """Refuse, before the time is spent, a folder that cannot be made after it; make nothing.

    Raises:
        SpecError: nothing can be written where it would stand.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise SpecError(f"{option} {path}: cannot be written: {error.strerror}") from None


def make_folder(option: str, path: Path) -> None:
    """Make a folder, before the time is spent, and see that files can be written there.

    Raises:
        SpecError: it cannot be made, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SpecError(f"{option} {path}: cannot be written: {error.strerror}") from None
