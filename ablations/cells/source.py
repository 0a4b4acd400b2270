"""A YAML file and where each of its fields stands, for errors that name the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from layerzoo.spec import SpecError, suggest
from layerzoo.support.yaml_files import read_yaml

YAML_LOADER: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # in C where PyYAML was built with it
Place = tuple[str, ...]


def shipped_grids() -> dict[str, Path]:
    folder = Path(str(resources.files("layerzoo.ablations"))) / "grids"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class Source:
    """A grid file as read. A place in it is the keys that lead there; a list's are "0", "1", ..

    A file may have `sizes`: names, and the fields that each changes. A field of a size replaces
    the field of the file; mappings are replaced entry by entry.

    text: the file.
    tree: its fields, with keys as they are written, so that an option `1e-3` or `on` is named just
        that. Interpolations are unresolved.
    size: the size that is read; by default the file's `size`, or the first.

    Raises:
        SpecError: it cannot be read, is not YAML, names a key twice, or has no such size.
    """

    def __init__(self, path: Path, size: str | None = None) -> None:
        self.path = path
        try:
            fields = OmegaConf.to_container(read_yaml(path), resolve=False)
        except SpecError as error:
            raise SpecError(f"grid {error}") from None
        self.text = path.read_text(encoding="utf-8")
        self._lines: dict[Place, int] = {}
        self._written: dict[Place, str] = {}
        node = yaml.compose(self.text, YAML_LOADER)
        self.tree: dict[str, Any] = self._read(node, fields, ())
        self.sizes = self._sizes()
        self.size = size or self.tree.get("size") or next(iter(self.sizes), None)
        if self.size is not None:
            self._resize(str(self.size))

    @property
    def copy(self) -> str:
        """The text of a file that is this one at this size."""
        text = re.sub(r"(?m)^size:.*\n?", "", self.text)
        return self.text if self.size is None else f"{text.rstrip()}\nsize: {self.size}\n"

    @property
    def question(self) -> str:
        """The file's first line, if it is a comment: what the grid is for."""
        first, *_ = self.text.splitlines() or [""]
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    def _sizes(self) -> list[str]:
        sizes = self.tree.get("sizes") or {}
        if not isinstance(sizes, dict):
            raise self.error(("sizes",), f"expected sizes, name: {{field: value}}, got {sizes!r}")
        for name, fields in sizes.items():
            if not isinstance(fields, dict):
                raise self.error(("sizes", name), f"expected field: value, got {fields!r}")
        return [*sizes]

    def _resize(self, size: str) -> None:
        """Put the fields of a size where the file's are, in values, lines and texts."""
        if size not in self.sizes:
            raise self.error(("sizes",), f"no size '{size}'; {suggest(size, self.sizes)}")
        for field, value in self.tree["sizes"][size].items():
            old, place = self.tree.get(field), ("sizes", size, field)
            if isinstance(old, dict) and isinstance(value, dict):
                self.tree[field] = {**old, **value}
                moves = [((*place, key), (field, key)) for key in value]
            else:
                self.tree[field] = value
                moves = [(place, (field,))]
            for start, end in moves:
                _move_facts(self._lines, start, end)
                _move_facts(self._written, start, end)

    def _read(self, node: Any, value: Any, place: tuple[str, ...]) -> Any:
        """Note the lines of what is under a place; its value, with keys as written."""
        if isinstance(node, yaml.MappingNode):
            pairs = _pairs_by_key(node)
            out = {}
            for (key, child), item in zip(pairs.values(), value.values(), strict=True):
                inner = (*place, key.value)
                self._lines[inner] = key.start_mark.line + 1
                out[key.value] = self._read(child, item, inner)
            return out
        if isinstance(node, yaml.SequenceNode):
            out = []
            for n, (child, item) in enumerate(zip(node.value, value, strict=True)):
                inner = (*place, str(n))
                self._lines[inner] = child.start_mark.line + 1
                out.append(self._read(child, item, inner))
            return out
        self._written[place] = node.value
        return value

    def value(self, *place: str) -> Any:
        """What stands at a place; None if nothing does."""
        found: Any = self.tree
        for key in place:
            if isinstance(found, list):
                found = found[int(key)]
            else:
                found = found.get(key) if isinstance(found, dict) else None
        return found

    def written(self, *place: str) -> str:
        """The text of the scalar at a place: `on`, not True."""
        return self._written.get(place, str(self.value(*place)))

    def error(self, place: tuple[str, ...], message: object) -> SpecError:
        """An error in the file, at the line of the place, or of what the message names there."""
        deep = place
        for name in _named_fields(str(message)):
            deep = (*deep, name) if (*deep, name) in self._lines else deep
        while deep and deep not in self._lines:
            deep = deep[:-1]
        line = f":{self._lines[deep]}" if deep else ""
        where = f"{'.'.join(place)}: " if place else ""
        return SpecError(f"grid {self.path}{line}: {where}{message}")

    @contextmanager
    def locating(self, *place: str) -> Iterator[None]:
        """Put the file, the line and the place before any `SpecError` that is raised inside."""
        try:
            yield
        except SpecError as error:
            raise self.error(place, error) from None


def _move_facts(facts: dict[Place, Any], start: Place, end: Place) -> None:
    """Move the facts about a place, and about all places under it, to another place."""
    n, m = len(start), len(end)
    moved = {(*end, *place[n:]): fact for place, fact in facts.items() if place[:n] == start}
    for stale in [place for place in facts if place[:m] == end]:
        del facts[stale]
    facts.update(moved)


def _pairs_by_key(node: yaml.MappingNode) -> dict[str, tuple[Any, Any]]:
    """Keys and values of a mapping by the text of the key, in the order of OmegaConf: what `<<`
    merges and the mapping does not set itself comes first."""
    merged: dict[str, tuple[Any, Any]] = {}
    own: dict[str, tuple[Any, Any]] = {}
    for key, child in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            parts = child.value if isinstance(child, yaml.SequenceNode) else [child]
            for part in reversed(parts):  # the first of them counts
                merged |= _pairs_by_key(part)
        else:
            own[key.value] = (key, child)
    return {key: pair for key, pair in merged.items() if key not in own} | own


def _named_fields(message: str) -> list[str]:
    """The fields that an error's message begins with: a.b of `a: b: expected ..`."""
    start = re.match(r"(?:[^\s:']+: )*(?:unknown field '[^']+)?", message)
    return re.findall(r"[^\s:.']+", start[0].replace("unknown field", "")) if start else []
