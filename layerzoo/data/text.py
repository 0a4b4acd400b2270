"""Bytes of text: the interpreter's standard library, or any local files."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import bits
from layerzoo.data.task import IGNORE, SPLITS, Task
from layerzoo.metrics import LossByPosition, TokenLoss


class Text(Task):
    """Next-byte prediction. Files are read as bytes, so any encoding will do.

    The files, in an order hashed from their names, are dealt to test, val and train; with fewer
    than three files each file is cut: its head to train, its tail to val and test. A sample is
    the window of length + 1 bytes at a hashed place of its split's concatenated files.

    Args:
        files: paths or globs (`**` is recursive); null is the source of the running
            interpreter's standard library: real text, always there.
        length: T, tokens a sample.
        held_out: share of the files for val, and again for test.
        documents: do not let a window's files see each other: emit `documents`, and do not
            score the first byte of a file.
        See `Task` for the others.

    Raises:
        SpecError: no file matches, a file cannot be read, or a split is shorter than a sample.
    """

    vocab_size = 256

    def __init__(
        self,
        files: list[str] | None = None,
        length: int = 256,
        held_out: float = 0.05,
        documents: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.require(length >= 1, f"length: must be at least 1, got {length}")
        self.require(0 < held_out < 0.5, f"held_out: must be in (0, 0.5), got {held_out}")
        self.files, self.length, self.held_out, self.documents = files, length, held_out, documents
        self._corpus: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}

    def metrics(self) -> list[Metric]:
        return [TokenLoss(1), LossByPosition(self.length, 1)]

    def setup(self, stage: str | None = None) -> None:
        """Read the files, once."""
        if self._corpus:
            return
        parts = self._split(self._read())
        for split in SPLITS:
            text = np.frombuffer(b"".join(parts[split]), np.uint8)
            starts = np.cumsum([0, *map(len, parts[split])])[:-1]
            self.require(
                len(text) > self.length,
                f"files: the {split} split has {len(text)} bytes, a sample needs "
                f"{self.length + 1}; give more files or a smaller length",
            )
            self._corpus[split] = text, starts

    def _read(self) -> dict[str, bytes]:
        """Contents by name, in sorted order; names are relative so that machines agree."""
        if self.files is None:
            root = Path(sysconfig.get_path("stdlib"))
            skip = {"site-packages", "test", "tests", "__pycache__"}
            paths = {str(p.relative_to(root)): p for p in root.rglob("*.py")}
            paths = {n: p for n, p in paths.items() if not skip & set(Path(n).parts)}
        else:
            paths = {}
            for pattern in self.files:
                path = Path(pattern).expanduser()
                self.require(
                    not path.is_dir(), f"files: '{pattern}' is a folder; write '{pattern}/**/*'"
                )
                names = [path] if path.is_file() else glob.glob(str(path), recursive=True)
                found = [p for p in map(Path, names) if p.is_file()]
                self.require(bool(found), f"files: nothing matches '{pattern}'")
                paths |= {p.as_posix(): p for p in found}
        contents = {}
        for name, path in sorted(paths.items()):
            try:
                contents[name] = path.read_bytes()
            except OSError as error:
                self.require(False, f"files: cannot read {path}: {error.strerror}")
        contents = {name: text for name, text in contents.items() if text}
        self.require(bool(contents), "files: the corpus is empty")
        return contents

    def _split(self, contents: dict[str, bytes]) -> dict[str, list[bytes]]:
        if len(contents) < len(SPLITS):
            parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
            for text in contents.values():
                tail = max(1, round(self.held_out * len(text)))
                cuts = (0, len(text) - 2 * tail, len(text) - tail, len(text))
                for split, low, high in zip(SPLITS, cuts, cuts[1:], strict=False):
                    parts[split].append(text[max(0, low) : max(0, high)])
            return parts
        order = sorted(contents, key=_hash)
        tail = max(1, round(self.held_out * len(order)))
        names = {"test": order[:tail], "val": order[tail : 2 * tail], "train": order[2 * tail :]}
        return {split: [contents[name] for name in sorted(names[split])] for split in SPLITS}

    def sample(self, split: str, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        self.setup()
        text, starts = self._corpus[split]
        places = np.uint64(len(text) - self.length)
        first = (bits(self.seed, SPLITS.index(split), index) % places).astype(np.int64)
        at = first[:, None] + np.arange(self.length + 1)
        tokens = text[at].astype(np.int64)
        position = np.broadcast_to(np.arange(1, self.length + 1), tokens[:, 1:].shape).copy()
        out = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].copy(), "position": position}
        if self.documents:
            files = np.searchsorted(starts, at, side="right")
            out["labels"][files[:, 1:] != files[:, :-1]] = IGNORE
            out["documents"] = files[:, :-1]
        return out


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
