"""What `layerzoo list --tasks` and `layerzoo list TASK` say."""

from __future__ import annotations

import inspect
import re
from typing import Any

from layerzoo.data import list_tasks
from layerzoo.data.task import Task
from layerzoo.spec import required
from layerzoo.support.field_docs import field_lines, field_rows


def describe_task(cls: type[Task]) -> dict[str, Any]:
    """A task at its defaults; None where it has none."""
    task = None if any(map(required, cls.Config.fields())) else cls()
    return {
        "name": cls.__name__,
        "vocabulary": task and task.vocab_size,
        "length": task and task.length,
        "chance": task and task.chance,
        "annotations": [] if task is None else _annotations(task),
        "source": _source(cls),
        "settings": [*cls.Config.settings],
    }


def describe_task_fully(cls: type[Task]) -> dict[str, Any]:
    """`describe_task`, the docstring, and the fields with types, defaults and docstrings."""
    return {**describe_task(cls), "doc": inspect.getdoc(cls), "fields": field_rows(cls.Config)}


def _source(cls: type[Task]) -> str | None:
    """The first paper in the docstring of the class, or of a base class."""
    found = (re.search(r"arXiv\s(\d+\.\d+)", base.__doc__ or "") for base in cls.__mro__)
    return next((match[1] for match in found if match), None)


def _annotations(task: Task) -> list[str]:
    return [name for name in task.batch("train", range(1)) if name not in ("tokens", "labels")]


def table() -> list[tuple[str, ...]]:
    """The tasks, a row each, after a row of heads."""
    rows = [describe_task(cls) for cls in list_tasks()]
    return [
        ("name", "vocabulary", "T", "chance", "annotations", "arXiv"),
        *(
            (
                row["name"],
                str(row["vocabulary"] or "-"),
                str(row["length"] or "-"),
                "-" if row["chance"] is None else f"{row['chance']:.3g}",
                " ".join(row["annotations"]),
                row["source"] or "",
            )
            for row in rows
        ),
    ]


def page(cls: type[Task]) -> str:
    """A task's docstring, its settings, and its options."""
    settings = "\n".join(f"  {name}: {fields}" for name, fields in cls.Config.settings.items())
    parts = [f"{cls.__name__} (task)", inspect.getdoc(cls) or ""]
    parts += [f"Settings:\n{settings}"] if settings else []
    return "\n\n".join([*parts, "Options:", "\n".join(field_lines(field_rows(cls.Config)))])
