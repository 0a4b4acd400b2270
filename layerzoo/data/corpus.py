"""Documents of text for train, val and test: from local files or from a dataset."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzoo.data.task import SPLITS
from layerzoo.data.tokenizer import NOWHERE, extra, reason
from layerzoo.spec import SpecError, at, suggest

Documents = dict[str, list[bytes]]
"""By split."""
NAMES = {"train": "train", "val": "validation", "test": "test"}
"""What datasets call the splits."""
STDLIB = "stdlib"
"""The entry of `files` that stands for the standard library's source."""


@dataclass(frozen=True)
class Source:
    """Where text comes from, and as what tokens it is read; see `Text` for the fields."""

    files: list[str] | None
    dataset: str | None
    subset: str | None
    column: str
    max_bytes: int
    held_out: float
    tokenizer: str | None

    def __post_init__(self) -> None:
        for valid, message in (
            (0 < self.held_out < 0.5, f"held_out: must be in (0, 0.5), got {self.held_out}"),
            (self.max_bytes >= 1, f"max_bytes: must be at least 1, got {self.max_bytes}"),
            (
                self.files is None or self.dataset is None,
                "dataset: the text is from files or from a dataset; leave one of them out",
            ),
            (
                self.subset is None or self.dataset is not None,
                f"subset: '{self.subset}' is of no dataset; give dataset, too",
            ),
        ):
            if not valid:
                raise SpecError(message)

    def read(self) -> Documents:
        if self.dataset is None:
            return deal(read_files(self.files), self.held_out, ["val", "test"])
        documents = read_dataset(self.dataset, self.subset, self.column, self.max_bytes)
        if missing := [split for split in SPLITS if split not in documents]:
            numbered = {f"{n:012}": text for n, text in enumerate(documents["train"])}
            documents |= deal(numbered, self.held_out, missing)
        return documents


def read_files(files: list[str] | None) -> dict[str, bytes]:
    """Contents by name, in sorted order; names are relative so that machines agree."""
    paths = _standard_library() if files is None or STDLIB in files else {}
    library = set(paths)
    for pattern in files or ():
        if pattern == STDLIB:
            continue
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise SpecError(f"files: '{pattern}' is a folder; write '{pattern}/**/*'")
        names = [path] if path.is_file() else glob.glob(str(path), recursive=True)
        found = {p.as_posix(): p for p in map(Path, names) if p.is_file()}
        if not found:
            raise SpecError(f"files: nothing matches '{pattern}'")
        # A file here may have the name of one of the library's: both are read.
        paths |= {f"./{name}" if name in library else name: p for name, p in found.items()}
    contents = {}
    for name, path in sorted(paths.items()):
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise SpecError(f"files: cannot read {path}: {error.strerror}") from None
    contents = {name: text for name, text in contents.items() if text}
    if not contents:
        raise SpecError("files: the corpus is empty")
    return contents


def _standard_library() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "__pycache__"}
    paths = {str(p.relative_to(root)): p for p in root.rglob("*.py")}
    return {name: path for name, path in paths.items() if not skip & set(Path(name).parts)}


def read_dataset(name: str, subset: str | None, column: str, max_bytes: int) -> Documents:
    """The first documents of each split that a dataset has, streamed: what is beyond `max_bytes`
    is not downloaded."""
    with at("dataset"):
        datasets = extra("datasets")
    path, where, file = Path(name).expanduser().absolute(), name, None
    if path.is_file():
        where, file = str(path.parent), path.name
    elif path.is_dir():
        where = str(path)
    try:
        found = datasets.load_dataset(where, subset, data_files=file, streaming=True)
        if "train" not in found:
            raise SpecError(
                f"dataset: '{name}' has no split 'train', but {', '.join(map(str, found))}"
            )
        return {
            split: _documents(found[NAMES[split]], column, max_bytes)
            for split in SPLITS
            if NAMES[split] in found
        }
    except (OSError, ValueError, RuntimeError) as error:
        # What the library raises of a wrong name, subset or file, or without a network.
        fault = "cannot be read" if path.exists() else NOWHERE
        raise SpecError(f"dataset: '{name}' {fault}: {reason(error)}") from None


def _documents(rows: Any, column: str, max_bytes: int) -> list[bytes]:
    documents, size = [], 0
    for row in rows:
        if column not in row:
            raise SpecError(f"column: the dataset has no '{column}'; {suggest(column, row)}")
        text = row[column]
        if not isinstance(text, str | None):
            raise SpecError(f"column: '{column}' holds {type(text).__name__}, not text")
        if text:
            documents.append(text.encode(errors="replace"))
            size += len(documents[-1])
        if size >= max_bytes:
            break
    return documents


def deal(contents: dict[str, bytes], held_out: float, missing: list[str]) -> Documents:
    """Deal documents, in an order hashed from their names, to the missing splits and to train;
    if they are fewer than three, cut each instead, its tail for the missing splits."""
    if len(contents) < len(SPLITS):
        parts: Documents = {split: [] for split in ("train", *missing)}
        for text in contents.values():
            tail = max(1, round(held_out * len(text)))
            ends = [max(0, len(text) - n * tail) for n in range(len(parts))][::-1]
            for split, low, high in zip(parts, [0, *ends], ends, strict=False):
                parts[split].append(text[low:high])
        return parts
    names = deal_names(contents, held_out, missing)
    return {split: [contents[name] for name in names[split]] for split in names}


def deal_names(names: Iterable[str], held_out: float, missing: list[str]) -> dict[str, list[str]]:
    """The names of at least three documents, dealt to the missing splits and to train."""
    order = sorted(names, key=_hash)
    tail = max(1, round(held_out * len(order)))
    dealt = {}
    for split in missing[::-1]:
        dealt[split], order = order[:tail], order[tail:]
    dealt["train"] = order
    return {split: sorted(dealt[split]) for split in dealt}


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
