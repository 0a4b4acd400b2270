"""The docstrings of a config's fields: the one text that help, pages and errors are made from."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_origin

from layerzoo.spec import Config, SpecError, field_types, plain, required


@functools.cache
def field_docs(config: type[Config]) -> dict[str, str]:
    """The docstring of each field, on one line: the string that follows its declaration.

    A class that declares a field again without a docstring keeps that of its base. The fields of
    a class whose source cannot be read have none.
    """
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if issubclass(cls, Config):
            docs |= _own(cls)
    return {field.name: docs[field.name] for field in config.fields() if field.name in docs}


def _own(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    (tree,) = ast.parse(source).body
    docs: dict[str, str] = {}
    name = None
    for node in tree.body if isinstance(tree, ast.ClassDef) else ():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = " ".join(str(node.value.value).split())
        declares = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        name = node.target.id if declares else None  # pyright: ignore[reportAttributeAccessIssue]
    return docs


def read_config(config: type[Config], fields: Mapping[str, Any]) -> Any:
    """`Config.from_fields`, whose errors also say what a field means that is missing, or that has
    a value of another type.

    Raises:
        SpecError: see `Config.from_fields`.
    """
    try:
        return config.from_fields(fields)
    except SpecError as error:
        fault = re.match(r"(\w+): (expected|missing)", str(error))
        doc = field_docs(config).get(fault[1]) if fault else None
        raise SpecError(f"{error}. {doc}" if doc else str(error)) from None


def field_rows(config: type[Config]) -> list[dict[str, Any]]:
    """A config's fields, its own before its bases': name, type, default, whether it is required,
    and docstring."""
    docs = field_docs(config)
    return [
        {
            "name": field.name,
            "type": _type_text(config, field.name, str(field.type)),
            "default": None if required(field) else plain(field.default),
            "required": required(field),
            "doc": docs.get(field.name, ""),
        }
        for field in config.nearest_first()
    ]


def _type_text(config: type[Config], name: str, written: str) -> str:
    """The type of a field as it is written, or the values that a name for them stands for."""
    hint = field_types(config).get(name)
    return repr(hint).removeprefix("typing.") if get_origin(hint) is Literal else written


def field_lines(rows: Iterable[Mapping[str, Any]], width: int = 88) -> list[str]:
    """The rows of fields in words: each with its type and default, and its docstring below."""
    lines = []
    for row in rows:
        default = "required" if row["required"] else f"= {json.dumps(row['default'])}"
        lines.append(f"  {row['name']}: {row['type']} {default}")
        lines += textwrap.wrap(
            row["doc"], width, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines
