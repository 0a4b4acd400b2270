"""Checks the laws of a layer or a task: a registered one, or those in a Python file."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from layerzoo.registry import list_layers
from layerzoo.spec import SpecError, suggest
from layerzoo.support.arguments import CommandParser
from layerzoo.testing.check import Broken, Check
from layerzoo.testing.layers import layer_checks
from layerzoo.testing.tasks import task_checks, write_golden


def main(argv: Sequence[str]) -> int:
    """Run the checks, print what is broken, then a line per law.

    Returns:
        1 if a law is broken, else 0.
    """
    parser = CommandParser("layerzoo check", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "name", nargs="+", help="check this layer or task, or those in this Python file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out compilation, low precision and workers"
    )
    parser.add_argument(
        "--golden", type=Path, metavar="FILE", help="compare tasks with the hashes in this file"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the hashes of these tasks into the golden file"
    )
    options = parser.parse_args(argv)
    if options.write and options.golden is None:
        raise SpecError("check: --write: give the file of hashes, too, by --golden FILE")
    layers, tasks = _named(options.name)
    if options.write:
        for cls in tasks:
            write_golden(cls, options.golden)
    found = layer_checks(*layers, quick=options.quick) if layers else []
    for cls in tasks:
        found += task_checks(cls, options.golden, options.quick)
    return _run(found)


def _named(names: Sequence[str]) -> tuple[list[str], list[type]]:
    """The layers and the tasks of these names and files."""
    from layerzoo.data import list_tasks

    layers, tasks = list[str](), list[type]()
    for name in names:
        if name.endswith(".py"):
            before, known = {*list_layers()}, {*list_tasks()}
            _load(Path(name))
            new = [x for x in list_layers() if x not in before]
            more = [cls for cls in list_tasks() if cls not in known]
            if not new and not more:
                raise SpecError(f"check: {name}: defines no layer and no task")
            layers, tasks = layers + new, tasks + more
            continue
        by_name = {cls.__name__: cls for cls in list_tasks()}
        if name in by_name:
            tasks.append(by_name[name])
        elif name in list_layers():
            layers.append(name)
        else:
            hint = suggest(name, [*list_layers(), *by_name])
            raise SpecError(f"check: unknown layer or task '{name}'; {hint}; or give a file, *.py")
    for cls in tasks:
        if not cls.cases:
            raise SpecError(f"check: {cls.__name__}: has no cases, small options to check it with")
    return layers, tasks


def _load(path: Path) -> None:
    """Import a file, which registers its layers.

    Raises:
        SpecError: there is no such file, it is no Python, it imports what is not there, or the
            registry refuses a layer in it.
    """
    if not path.is_file():
        raise SpecError(f"check: {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, TypeError) as error:
        raise SpecError(f"check: {path}: {type(error).__name__}: {error}") from error


def _run(found: Sequence[Check]) -> int:
    """Run the checks; a law that cannot be run for an error of the layer's is broken, too."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks are no fault
    console = Console(highlight=False, soft_wrap=True)
    held, broken, began = Counter[str](), Counter[str](), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        row = progress.add_task("", total=len(found))
        for check in found:
            progress.update(row, description=str(check))
            try:
                check()
            except Broken as error:
                broken[check.law.name] += 1
                console.print(f"{error}\n", markup=False)
            except Exception:  # of the layer's; the other checks are run all the same
                broken[check.law.name] += 1
                console.print(traceback.format_exc(), markup=False)
            else:
                held[check.law.name] += 1
            progress.advance(row)
    statements = {check.law.name: check.law.statement for check in found}
    for name, statement in statements.items():
        count = held[name] + broken[name]
        state = f"broken in {broken[name]} of {count}" if broken[name] else f"holds in {count}"
        console.print(f"{name:<16}{state:<20}{statement}", markup=False)
    failed, seconds = sum(broken.values()), time.monotonic() - began
    told = (
        f"{failed} of {len(found)} checks are broken"
        if failed
        else f"All {len(found)} checks hold"
    )
    console.print(f"{told} ({seconds:.0f} s).")
    return 1 if failed else 0
