"""JSON of figures: files written whole or not at all, and valid whatever the numbers are.

JSON has no numbers that are not finite; here they are the strings "nan", "inf" and "-inf", which
Python's `float` reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

NOT_FINITE = ("nan", "inf", "-inf")


def dumps(tree: Any, indent: int | None = 2) -> str:
    """A tree of mappings, lists and numbers of any library as valid JSON."""
    return json.dumps(_plain(tree), indent=indent, allow_nan=False)


def write_json(path: Path, tree: Any, indent: int = 2) -> None:
    """Write a file whole or not at all."""
    text = dumps(tree, indent) + "\n"
    if path.exists() and not path.is_file():  # a pipe, or a device: nothing can replace it
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def floats(tree: Any) -> Any:
    """What `dumps` was given of figures, from what JSON holds: "nan", "inf" and "-inf" are
    numbers again. Not of a tree in which they may be words."""
    if isinstance(tree, dict):
        return {key: floats(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [floats(value) for value in tree]
    return float(tree) if tree in NOT_FINITE else tree


def read_figures(path: Path) -> Any:
    """The figures of a file that `write_json` wrote."""
    return floats(json.loads(path.read_text(encoding="utf-8")))


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    if isinstance(tree, bool) or not isinstance(tree, Real):
        return tree
    if isinstance(tree, Integral):
        return int(tree)
    number = float(tree)
    return number if math.isfinite(number) else str(number)
