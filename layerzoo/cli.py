"""The command `layerzoo`. Each subcommand imports what it needs, and no more."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from layerzoo import foreign
from layerzoo.arguments import Parser
from layerzoo.json_files import dumps
from layerzoo.layer import Layer, build, get_layer, list_layers
from layerzoo.spec import Diverged, SpecError, plain, required, suggest

DIM, LENGTH = 256, 4096
"""What `layerzoo list` computes state sizes for."""


def describe(name: str) -> dict[str, Any]:
    """What `layerzoo list` says of a layer."""
    cls = get_layer(name)
    fields = cls.Config.fields()
    state = None
    if not any(map(required, fields)):
        state = build(name, dim=DIM).state_bytes(LENGTH).total
    return {"name": name, "kind": cls.kind, "state_bytes": state, "source": cls.source}


def describe_fully(cls: type[Layer]) -> dict[str, Any]:
    """`describe`, the docstring with the equation, and the fields with types and defaults."""
    fields = {
        field.name: {
            "type": field.type if isinstance(field.type, str) else str(field.type),
            "default": None if required(field) else plain(field.default),
            "required": required(field),
        }
        for field in cls.Config.fields()
    }
    # A dataclass without a docstring is given its signature as one: it says nothing new.
    docs = [inspect.getdoc(base) or "" for base in reversed(cls.Config.__mro__[:-2])]
    text = [doc for doc in docs if not doc.startswith("Config(")]
    return {
        **describe(cls.name),
        "impls": [impl for impl in ("recurrent", "chunked", "triton") if impl in _impls(cls)],
        "doc": inspect.getdoc(cls),
        "field_docs": text,
        "fields": fields,
    }


def _impls(cls: type[Layer]) -> tuple[str, ...]:
    return cls.op.available() if cls.op else ("recurrent", "chunked")


def _size(count: int | None) -> str:
    if count is None:
        return "its children's"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def list_command(argv: Sequence[str]) -> int:
    parser = Parser("layerzoo list", description="The layers, or the tasks, of the zoo.")
    parser.add_argument("name", nargs="?", help="show this layer's or task's page")
    parser.add_argument("--tasks", action="store_true", help="list the tasks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.tasks or (options.name and options.name not in list_layers()):
        return _list_tasks(options.name, options.json)
    if options.name:
        info = describe_fully(get_layer(options.name))
        print(dumps(info) if options.json else _page(info))
        return 0
    rows = [describe(name) for name in list_layers()]
    if options.json:
        print(dumps(rows))
        return 0
    head = ("name", "kind", f"state at dim {DIM}, T {LENGTH}", "source")
    _print([head, *((r["name"], r["kind"], _size(r["state_bytes"]), r["source"]) for r in rows)])
    return 0


def _print(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _list_tasks(name: str | None, as_json: bool) -> int:
    """All tasks, or the page of one, which is no layer's name."""
    from layerzoo.data import list_tasks, listing  # lightning takes seconds

    tasks = {cls.__name__: cls for cls in list_tasks()}
    if name is not None and name not in tasks:
        hint = suggest(name, [*list_layers(), *tasks])
        raise SpecError(f"unknown layer or task '{name}'; {hint}")
    if as_json:
        found = [listing.describe(cls) for cls in tasks.values()]
        print(dumps(found if name is None else listing.describe(tasks[name])))
    elif name is None:
        _print(listing.table())
    else:
        print(listing.page(tasks[name]))
    return 0


def _page(info: dict[str, Any]) -> str:
    lines = [f"{info['name']} ({info['kind']}), {info['source']}", "", info["doc"], ""]
    lines += [f"State at dim {DIM}, T {LENGTH}: {_size(info['state_bytes'])}."]
    lines += [f"Implementations: {', '.join(info['impls'])}.", "", "Config fields:"]
    for name, field in info["fields"].items():
        default = "required" if field["required"] else f"= {json.dumps(field['default'])}"
        lines.append(f"  {name}: {field['type']} {default}")
    for doc in info["field_docs"]:
        lines += ["", doc]
    return "\n".join(lines)


def generate_command(argv: Sequence[str]) -> int:
    from layerzoo import generate_command

    return generate_command.main(argv)


def train_command(argv: Sequence[str]) -> int:
    from layerzoo import training

    return training.main(argv)


def ablate_command(argv: Sequence[str]) -> int:
    return importlib.import_module("layerzoo.ablations.command").main(argv)


def describe_command(argv: Sequence[str]) -> int:
    return importlib.import_module("layerzoo.describe.command").main(argv)


def convert_command(argv: Sequence[str]) -> int:
    return importlib.import_module("layerzoo.hf.convert_command").main(argv)


def evaluate_command(argv: Sequence[str]) -> int:
    return importlib.import_module("layerzoo.hf.evaluate").main(argv)


def bench_command(argv: Sequence[str]) -> int:
    return importlib.import_module("layerzoo.bench.command").main(argv)


def check_command(argv: Sequence[str]) -> int:
    return importlib.import_module("layerzoo.testing.command").main(argv)


COMMANDS = {
    "fit": (train_command, "train a model from a config"),
    "validate": (train_command, "evaluate a checkpoint on the validation split"),
    "test": (train_command, "evaluate a checkpoint on the test split"),
    "predict": (train_command, "save a checkpoint's predictions on the test split"),
    "list": (list_command, "list the layers, or --tasks; `list NAME` shows all of one"),
    "check": (check_command, "check the laws of a layer or a task, or of those in a file"),
    "describe": (describe_command, "count a model's parameters, FLOPs and state at any length"),
    "generate": (generate_command, "continue a prompt, or a state, with a checkpoint"),
    "convert": (convert_command, "put a memory beside the attention of a pretrained model"),
    "evaluate": (evaluate_command, "compare a converted model with its source and controls"),
    "ablate": (ablate_command, "run a grid of training runs and compare them"),
    "bench": (bench_command, "time ops or layers, in pairs with other libraries"),
}


def _run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: layerzoo COMMAND [options]\n")
        print("\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()))
        print("\nlayerzoo COMMAND --help shows a command's options.")
        return 0
    if args[0] not in COMMANDS:
        raise SpecError(f"unknown command '{args[0]}'; {suggest(args[0], COMMANDS)}")
    command = COMMANDS[args[0]][0]
    return command(args if command is train_command else args[1:])


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
        message = foreign.line(error)
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
