"""Documents of text for train, val and test: from local files or from a dataset."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layerzoo.data.task import SPLITS
from layerzoo.data.tokenizer import NOWHERE, extra, reason
from layerzoo.spec import Config, SpecError, error_at, require, suggest

Contents = dict[str, bytes]
"""Documents by their digests."""
Dealt = dict[str, list[tuple[str, bytes]]]
"""Documents by split, each with the digest that it had before it was cut."""
Documents = dict[str, list[bytes]]
"""By split."""
NAMES = {"train": "train", "val": "validation", "test": "test"}
"""What datasets call the splits."""
STDLIB = "stdlib"
"""The entry of `files` that stands for the standard library's source."""


class TextSource(Config):
    """Where text comes from, and as what tokens it is read."""

    files: Sequence[str] | None = None
    """The text is in these files, paths or globs (`**` is recursive). null is the source of the
    running interpreter's standard library: real text, always there. An entry `stdlib` stands for
    the same and can be mixed with others (`[stdlib, ~/books/**/*.txt]`); a file of that name is
    `./stdlib`."""
    held_out: float = 0.05
    """This share of the files is for validation, and as much for testing."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder that holds one, or a Hugging Face id names the tokenizer. With
    null a token is a byte."""
    dataset: str | None = None
    """The text is in this dataset and not in files: a Hugging Face id, or a folder or file of
    JSON lines, Parquet or the like. It is streamed."""
    subset: str | None = None
    """This configuration of the dataset is read."""
    column: str = "text"
    """This column of the dataset holds the text."""
    max_bytes: int = 100_000_000
    """Each split of the dataset ends with the document that reaches this size."""

    def check(self) -> None:
        super().check()
        require(0 < self.held_out < 0.5, f"held_out: must be in (0, 0.5), got {self.held_out}")
        require(self.max_bytes >= 1, f"max_bytes: must be at least 1, got {self.max_bytes}")
        require(
            self.files is None or self.dataset is None,
            "dataset: the text is from files or from a dataset; leave one of them out",
        )
        require(
            self.subset is None or self.dataset is not None,
            f"subset: '{self.subset}' is of no dataset; give dataset, too",
        )

    def read(self) -> DocumentSet:
        """Read it all now.

        Raises:
            SpecError: see `Text`.
        """
        if self.dataset is None:
            contents = read_files(self.files)
            return DocumentSet(
                _texts(deal(contents, self.held_out, ["val", "test"])), digest([*contents])
            )
        splits = read_dataset(self.dataset, self.subset, self.column, self.max_bytes)
        of_all = digest([f"{split} {name}" for split in splits for name in splits[split]])
        documents = {split: [*contents.values()] for split, contents in splits.items()}
        if missing := [split for split in SPLITS if split not in splits]:
            documents |= _texts(deal(splits["train"], self.held_out, missing))
        return DocumentSet(documents, of_all)


class DocumentSet(NamedTuple):
    """The documents of a source, and a digest of all that it holds: the same for the same
    contents, wherever they lie and whatever they are called."""

    documents: Documents
    digest: str


def digest(lines: Iterable[str]) -> str:
    """SHA-256 of a few lines, in hex."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def distinct(documents: Iterable[bytes]) -> Contents:
    """Documents by the SHA-256 of their contents, in its order; equal ones count once, and empty
    ones do not."""
    found = {hashlib.sha256(text).hexdigest(): text for text in documents if text}
    return dict(sorted(found.items()))


def read_files(files: Sequence[str] | None) -> Contents:
    """The contents of files, see `distinct`; what a path is, and how it is written, does not
    matter."""
    paths = dict.fromkeys(_standard_library() if files is None or STDLIB in files else ())
    for pattern in files or ():
        if pattern == STDLIB:
            continue
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise SpecError(f"files: '{pattern}' is a folder; write '{pattern}/**/*'")
        names = [path] if path.is_file() else glob.glob(str(path), recursive=True)
        found = [p for p in map(Path, names) if p.is_file()]
        if not found:
            raise SpecError(f"files: nothing matches '{pattern}'")
        paths |= dict.fromkeys(found)
    contents = distinct(map(_bytes, paths))
    if not contents:
        raise SpecError("files: the corpus is empty")
    return contents


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"files: cannot read {path}: {error.strerror}") from None


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "__pycache__"}
    return [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]


def read_dataset(
    name: str, subset: str | None, column: str, max_bytes: int
) -> dict[str, Contents]:
    """The first documents of each split that a dataset has, streamed, see `distinct`: what is
    beyond `max_bytes` is not downloaded."""
    with error_at("dataset"):
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


def _documents(rows: Any, column: str, max_bytes: int) -> Contents:
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
    return distinct(documents)


def deal(contents: Contents, held_out: float, missing: list[str]) -> Dealt:
    """Deal documents, in the order of their digests, to the missing splits and to train; if they
    are fewer than three, cut each instead, its tail for the missing splits."""
    order = [(name, contents[name]) for name in sorted(contents)]
    if len(order) < len(SPLITS):
        parts: Dealt = {split: [] for split in ("train", *missing)}
        for name, text in order:
            tail = max(1, round(held_out * len(text)))
            ends = [max(0, len(text) - n * tail) for n in range(len(parts))][::-1]
            for split, low, high in zip(parts, [0, *ends], ends, strict=False):
                parts[split].append((name, text[low:high]))
        return parts
    tail = max(1, round(held_out * len(order)))
    dealt = {}
    for split in missing[::-1]:
        dealt[split], order = order[:tail], order[tail:]
    return {**dealt, "train": order}


def _texts(dealt: Dealt) -> Documents:
    return {split: [text for _, text in documents] for split, documents in dealt.items()}
