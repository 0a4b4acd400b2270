"""The command `layerzoo`. Each subcommand imports what it needs, and no more."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from layerzoo.spec import Diverged, SpecError, suggest
from layerzoo.support import error_lines

TRAIN = "layerzoo.train.command"
COMMANDS = {
    "fit": (TRAIN, "train a model from a config"),
    "validate": (TRAIN, "evaluate a checkpoint on the validation split"),
    "test": (TRAIN, "evaluate a checkpoint on the test split"),
    "predict": (TRAIN, "save a checkpoint's predictions on the test split"),
    "list": (
        "layerzoo.tools.list",
        "list the layers, or --tasks; `list NAME` shows all of one",
    ),
    "check": (
        "layerzoo.tools.check",
        "check the laws of a layer or a task, or of those in a file",
    ),
    "describe": (
        "layerzoo.tools.describe.command",
        "count a model's parameters, FLOPs and state at any length",
    ),
    "generate": (
        "layerzoo.tools.generate",
        "continue a prompt, or a state, with a checkpoint",
    ),
    "convert": (
        "layerzoo.tools.convert",
        "put a memory beside the attention of a pretrained model",
    ),
    "evaluate": (
        "layerzoo.tools.evaluate.command",
        "compare a converted model with its source and controls",
    ),
    "ablate": ("layerzoo.ablations.command", "run a grid of training runs and compare them"),
    "bench": (
        "layerzoo.tools.bench.command",
        "time ops or layers, in pairs with other libraries",
    ),
}
"""The module of each command, whose `main` takes the arguments, and what the command does."""


def _run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: layerzoo COMMAND [options]\n")
        print("\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()))
        print("\nlayerzoo COMMAND --help shows a command's options.")
        return 0
    if args[0] not in COMMANDS:
        raise SpecError(f"unknown command '{args[0]}'; {suggest(args[0], COMMANDS)}")
    module, _ = COMMANDS[args[0]]
    main = importlib.import_module(module).main
    return main(args if module == TRAIN else args[1:])


TRACEBACK = "LAYERZOO_TRACEBACK"
"""The environment variable that shows where an error of use was raised."""
PIPE = 141
"""The exit status of a program whose reader has gone, as a shell has it (128 + SIGPIPE)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        the exit status: the command's own; 2 after an error of use, whoever raised it, which is
        one line on stderr; 1 after training that diverged; 130 after ^C; 141 where nobody reads
        the output any more, which is no error.
    """
    _open_streams()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, for what reads it may be gone, or the disk full
        return status
    except BrokenPipeError:
        _close_stdout()
        return PIPE
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Diverged as error:
        return _say(f"diverged: {error}", 1)
    except Exception as error:
        message = error_lines.line(error)
        if message is None or os.environ.get(TRACEBACK):
            raise
        return _say(f"error: {message}", 2)


def _say(message: str, status: int) -> int:
    print(f"layerzoo: {message}", file=sys.stderr)
    return status


def _open_streams() -> None:
    """The shell may have closed them, and their encoding may lack a letter that is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _close_stdout() -> None:
    """What is still in the buffer goes nowhere, so that the interpreter's exit is quiet."""
    with suppress(OSError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
