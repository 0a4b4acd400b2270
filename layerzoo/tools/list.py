"""`layerzoo list`: the layers and the tasks of the zoo, and the page of one of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerzoo.layer import Layer
from layerzoo.registry import build, get_layer, list_layers
from layerzoo.spec import SpecError, required, suggest
from layerzoo.support.arguments import CommandParser, check_file
from layerzoo.support.field_docs import field_lines, field_rows
from layerzoo.support.json_files import dumps
from layerzoo.tools import options_page

DIM, LENGTH = 256, 4096
"""What `layerzoo list` computes state sizes for."""
WRITTEN = (
    "Written by `layerzoo list --write docs/layers.md`. `layerzoo list NAME` prints a layer's "
    "equation, fields and deviations from its source."
)


def describe_layer(name: str) -> dict[str, Any]:
    """What `layerzoo list` says of a layer."""
    cls = get_layer(name)
    fields = cls.Config.fields()
    state = None
    if not any(map(required, fields)):
        state = build(name, dim=DIM).state_bytes(LENGTH).total
    return {
        "name": name,
        "kind": cls.kind,
        "summary": summary(cls),
        "state_bytes": state,
        "source": cls.source,
    }


def summary(cls: type[Layer]) -> str:
    """The first paragraph of a layer's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


KINDS = {
    "memory": "Memories write every token into a state of constant size.",
    "attention": "Attention reads a cache of keys and values.",
    "composition": "Compositions are made of children, which are layers.",
}


def markdown() -> str:
    """A page with a table of the layers of each kind."""
    lines = ["# The layers", "", WRITTEN, ""]
    for kind, sentence in KINDS.items():
        lines += [f"## {kind.capitalize()}", "", sentence, ""]
        lines += [f"| layer | what it is | state at dim {DIM}, T {LENGTH} | source |"]
        lines += ["| --- | --- | ---: | --- |"]
        for name in list_layers(kind):
            row = describe_layer(name)
            source, summary = (row[key].replace("|", "\\|") for key in ("source", "summary"))
            lines.append(f"| `{name}` | {summary} | {_size(row['state_bytes'])} | {source} |")
        lines.append("")
    return "\n".join(lines)


def describe_layer_fully(cls: type[Layer]) -> dict[str, Any]:
    """`describe_layer`, the docstring with the equation, and the fields with types, defaults and
    docstrings."""
    return {
        **describe_layer(cls.name),
        "impls": [impl for impl in ("recurrent", "chunked", "triton") if impl in _impls(cls)],
        "doc": inspect.getdoc(cls),
        "fields": field_rows(cls.Config),
    }


def _impls(cls: type[Layer]) -> tuple[str, ...]:
    return cls.op.available() if cls.op else ("recurrent", "chunked")


def _size(count: int | None) -> str:
    if count is None:
        return "its children's"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def main(argv: Sequence[str]) -> int:
    """Print the layers, the tasks, or the page of one of them."""
    parser = CommandParser("layerzoo list", description="The layers, or the tasks, of the zoo.")
    parser.add_argument("name", nargs="?", help="show this layer's or task's page")
    parser.add_argument("--tasks", action="store_true", help="list the tasks")
    parser.add_argument("--options", action="store_true", help="list every option of everything")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", metavar="FILE", help="write the list as a page of markdown")
    options = parser.parse_args(argv)
    if options.write:
        check_file("--write", options.write, (".md",))
        page = options_page.markdown() if options.options else markdown()
        Path(options.write).write_text(page, encoding="utf-8")
        return 0
    if options.options:
        print(options_page.markdown())
        return 0
    if options.tasks or (options.name and options.name not in list_layers()):
        return _list_tasks(options.name, options.json)
    if options.name:
        info = describe_layer_fully(get_layer(options.name))
        print(dumps(info) if options.json else _page(info))
        return 0
    rows = [describe_layer(name) for name in list_layers()]
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
        found = [listing.describe_task(cls) for cls in tasks.values()]
        print(dumps(found if name is None else listing.describe_task_fully(tasks[name])))
    elif name is None:
        _print(listing.table())
    else:
        print(listing.page(tasks[name]))
    return 0


def _page(info: dict[str, Any]) -> str:
    lines = [f"{info['name']} ({info['kind']}), {info['source']}", "", info["doc"], ""]
    lines += [f"State at dim {DIM}, T {LENGTH}: {_size(info['state_bytes'])}."]
    lines += [f"Implementations: {', '.join(info['impls'])}.", "", "Config fields:"]
    lines += field_lines(info["fields"])
    return "\n".join(lines)
