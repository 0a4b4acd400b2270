"""What becomes of the options of a config's task where another task takes its place."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from layerzoo.data.task import Task, list_tasks


class Replaced(NamedTuple):
    """A task in place of another: which of the other's options it drops, and which it keeps."""

    old: str
    new: str
    dropped: list[str]
    kept: dict[str, Any]

    def __str__(self) -> str:
        kept = ", ".join(f"{name} {value}" for name, value in self.kept.items()) or "nothing"
        dropped = ", ".join(self.dropped) or "nothing"
        return f"{self.new} takes the place of {self.old}; it drops {dropped}; it keeps {kept}"


def find_task(path: Any) -> type[Task] | None:
    """The task of a class path, or of the name of an imported task; None if there is none."""
    known = {cls.__name__: cls for cls in list_tasks()}
    place, _, name = str(path).rpartition(".")
    if not place:
        return known.get(name)
    try:
        found = getattr(importlib.import_module(place), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, Task) else None


def replaced(written: Any, path: Any) -> Replaced | None:
    """What is left of a task's section, with class_path and init_args, for the task of a path.

    Returns:
        None if that is the same task, or if either is not known.
    """
    if not isinstance(written, Mapping):
        return None
    old, new = find_task(written.get("class_path")), find_task(path)
    options = written.get("init_args")
    if old is None or new is None or old is new or not isinstance(options, Mapping):
        return None
    takes = {name: value for name, value in options.items() if new.Config.takes(name, value)}
    dropped = [name for name in options if name not in takes]
    return Replaced(old.__name__, new.__name__, dropped, takes)
