"""`layerzoo ablate list|plan|run|status|report|board|validate`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from layerzoo.spec import SpecError
from layerzoo.support.arguments import CommandParser

from .cells.source import shipped_grids


def _list_command(options: argparse.Namespace) -> int:
    for name, path in shipped_grids().items():
        print(f"{name}: {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    return 0


def _plan_command(options: argparse.Namespace) -> int:
    from .planning.plan import plan_command

    return plan_command(
        options.grid, not options.no_probe, options.jobs, options.json, options.size
    )


def _run_command(options: argparse.Namespace) -> int:
    from .grid_run import RunOptions, run_grid

    run_options = RunOptions(
        out=options.out,
        jobs=options.jobs,
        threads=options.threads,
        executor=options.executor,
        shard=_read_shard(options.shard),
        retries=options.retries,
        limit=options.limit_cells,
        every=options.checkpoint_every,
    )
    return run_grid(options.grid, run_options, options.size)


def _validate_command(options: argparse.Namespace) -> int:
    from .grid_run import RunOptions
    from .validate import validate_grids

    return validate_grids(
        options.grids, RunOptions(out=options.out, jobs=options.jobs), options.all
    )


def _report_command(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .reporting.report_files import compare

    console = Console(width=None if sys.stdout.isatty() else 160)
    return 0 if compare(options.dir, console, options.to) else 1


def _status_command(options: argparse.Namespace) -> int:
    from .running.status import show_status

    return show_status(options.dir, options.json)


def _board_command(options: argparse.Namespace) -> int:
    from .reporting.board.server import serve_board

    return serve_board(options.dir, options.host, options.port)


def _read_shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise SpecError(f"--shard: expected i/n with i from 1 to n, as in 1/4, got '{text}'")
    return part, parts


def _command_parser() -> argparse.ArgumentParser:
    parser = CommandParser("layerzoo ablate", description="Grids of training runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, text in (
        ("list", _list_command, "list the shipped grids"),
        (
            "plan",
            _plan_command,
            "print a grid's cells, their sizes and how long they take; run nothing",
        ),
        ("run", _run_command, "run a grid's unfinished cells and compare all"),
        ("status", _status_command, "say where a grid's cells are"),
        ("report", _report_command, "write the report of a grid's results, finished or not"),
        ("board", _board_command, "compare grids in TensorBoard"),
        (
            "validate",
            _validate_command,
            "run the grids that claim published figures, and judge them",
        ),
    ):
        commands.add_parser(name, help=text).set_defaults(function=function)
    plan, runner, status, report, board, validate = (
        commands.choices[name] for name in ("plan", "run", "status", "report", "board", "validate")
    )
    for command in (plan, runner):
        command.add_argument("grid", help="read this shipped grid, or YAML file")
        command.add_argument("--size", help="take this size of the grid (default: its first)")
    for command in (plan, runner, validate):
        command.add_argument(
            "--jobs", type=int, help="run so many cells at a time (default: cores or GPUs)"
        )
    references = "judge this grid with claims (default: all shipped ones of up to 10 minutes)"
    validate.add_argument("grids", nargs="*", metavar="GRID", help=references)
    validate.add_argument("--all", action="store_true", help="run the long ones, too")
    plan.add_argument("--no-probe", action="store_true", help="estimate no time: train no step")
    runs = Path("runs") / "ablations"
    for command in (runner, validate):
        text = f"keep the results in this folder, by grid (default {runs})"
        command.add_argument("--out", type=Path, default=runs, help=text)
    add = runner.add_argument
    add("--executor", choices=("local", "ray"), default="local", help="run cells here")
    add("--threads", type=int, default=1, help="give a cell so many CPU threads (default 1)")
    add("--shard", default="1/1", help="run part i of n, i/n, each on a machine of its own")
    add(
        "--retries",
        type=int,
        default=1,
        help="run a cell that fails so many times again (default 1)",
    )
    add("--limit-cells", type=int, help="run so many cells at most")
    every = "save a cell's checkpoint after so many seconds (default 30)"
    add("--checkpoint-every", type=float, default=30.0, metavar="SECONDS", help=every)
    for command in (status, report):
        command.add_argument("dir", type=Path, help="read this grid's folder of results")
    report.add_argument(
        "--to", type=Path, help="write the report to this folder (default DIR/report)"
    )
    board.add_argument(
        "dir", type=Path, help="show the results in this folder, of one grid or several"
    )
    board.add_argument(
        "--host", default="localhost", help="listen here; 0.0.0.0 is for other machines, too"
    )
    board.add_argument(
        "--port", type=int, help="listen at this port (default 6006, or the next free one)"
    )
    for command in (plan, status):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


OPTION_MINIMA = (
    ("jobs", 1),
    ("threads", 1),
    ("retries", 0),
    ("limit_cells", 1),
    ("checkpoint_every", 0),
    ("port", 0),
)


def main(argv: Sequence[str]) -> int:
    options = _command_parser().parse_args(argv)
    for name, least in OPTION_MINIMA:
        value = getattr(options, name, None)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise SpecError(f"--{flag}: must be at least {least}, got {value}")
    return options.function(options)
