"""Text, as bytes or as tokens: the interpreter's standard library, local files, a dataset."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.corpus import Documents, TextSource
from layerzoo.data.random import below, bits
from layerzoo.data.task import IGNORE, SPLITS, Task
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.metrics import LossByPosition, TokenLoss
from layerzoo.spec import error_at, require


class Corpus(NamedTuple):
    """A split: its documents in a row, where each starts, and the bytes that they are."""

    tokens: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]
    bytes: int


class Text(Task):
    """Next-token prediction of text: a token is a byte unless a tokenizer is given. Files are
    read as bytes, so any encoding will do; a tokenizer reads them as UTF-8.

    The files, in the order of the SHA-256 of their contents, are dealt to test, val and train;
    with fewer than three files each file is cut: its head to train, its tail to val and test.
    Files of equal contents count once. So the splits depend on what the files hold, and not on
    where they lie, what they are called, or how `files` names them. Of a dataset the splits
    train, validation and test are used, each in such an order; the documents of train are dealt,
    as files are, to those that it lacks. A sample is the window of length + 1 tokens at a hashed
    place of its split's concatenated documents. Nothing is put between them, so that the text,
    and with it the bits a byte, is the same whatever the tokens are; `documents` keeps them
    apart.

    Raises:
        SpecError: no file matches, a file, dataset or tokenizer cannot be read, the extra that it
            needs is missing, or a split is shorter than a sample.
    """

    class Config(Task.Config, TextSource):
        length: int = 256
        """A sample has T tokens."""
        documents: bool = False
        """If true, the files in a window do not see each other, and the first token of a file is
        not scored. The batch then has `documents`."""

        def check(self) -> None:
            super().check()
            require(self.length >= 1, f"length: must be at least 1, got {self.length}")

    # No `cases`: the standard library is another text in every version of Python.
    in_context: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.source = TextSource(**{f.name: getattr(config, f.name) for f in TextSource.fields()})
        with error_at(f"data: {type(self).__name__}: tokenizer"):
            name = config.tokenizer
            self.tokenizer = None if name is None else Tokenizer(name)
        self.documents = config.documents
        self.vocab_size = 256 if self.tokenizer is None else self.tokenizer.vocab_size
        self._corpus: dict[str, Corpus] = {}
        self._documents: Documents = {}  # that are read, and not encoded yet
        self._digest: dict[str, str] = {}  # of what is read

    def varied(self, **changes: Any) -> Self:
        """A task with other options, which shares the text and the tokenizer as they were read, if
        it is of the same source."""
        task = super().varied(**changes)
        if task.source == self.source:
            task.tokenizer, task.vocab_size = self.tokenizer, self.vocab_size
            task._corpus, task._documents = self._corpus, self._documents
            task._digest = self._digest
        return task

    def digest(self) -> dict[str, str]:
        """Of the text and the tokenizer that this task has read; it reads them now if it has not.
        What changes on the disk after that is not seen."""
        self._read()
        tokenizer = {} if self.tokenizer is None else {"tokenizer": self.tokenizer.digest}
        return {**self._digest, **tokenizer}

    def _read(self) -> None:
        """Read the text, once."""
        if not self._digest:
            with error_at(f"data: {type(self).__name__}"):
                documents, found = self.source.read()
            self._documents |= documents
            self._digest["files" if self.source.dataset is None else "dataset"] = found

    @property
    def bytes_per_token(self) -> float:
        """Mean over the held-out text, val and test."""
        if self.tokenizer is None:
            return 1
        self.setup()
        held_out = [self._corpus["val"], self._corpus["test"]]
        return sum(c.bytes for c in held_out) / sum(len(c.tokens) for c in held_out)

    def metrics(self) -> list[Metric]:
        size = self.bytes_per_token
        return [TokenLoss(size), LossByPosition(self.length, size)]

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the text, once."""
        self._read()
        if not self._corpus:
            self._corpus |= {split: self._encode(self._documents[split]) for split in SPLITS}
            self._documents.clear()
        unit = "bytes" if self.tokenizer is None else "tokens"
        option = "files" if self.source.dataset is None else "dataset"
        more = "files" if self.source.dataset is None else "of it (max_bytes)"
        for split, (tokens, _, _) in self._corpus.items():
            self.require(
                len(tokens) > self.length,
                f"{option}: the {split} split has {len(tokens)} {unit}, a sample needs "
                f"{self.length + 1}; give more {more} or a smaller length",
            )

    def _encode(self, documents: list[bytes]) -> Corpus:
        text = b"".join(documents)
        if self.tokenizer is None:
            encoded, tokens = documents, np.frombuffer(text, np.uint8)
        else:
            encoded = self.tokenizer.encode(documents)
            tokens = np.concatenate(encoded) if encoded else np.empty(0, np.uint16)
        starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)[:-1]
        return Corpus(tokens, starts, len(text))

    def tokens(self, split: str) -> NDArray[np.integer[Any]]:
        """All tokens of a split, its documents in a row."""
        self.setup()
        return self._corpus[split].tokens

    def places(self, split: str, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens of each sample's window stand in its split, `[B, length + 1]`."""
        last = len(self.tokens(split)) - self.length
        first = below(last, bits(self.seed, SPLITS.index(split), index))
        return first[:, None] + np.arange(self.length + 1)

    def sample(self, split: str, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        where = self.places(split, index)
        text, starts, _ = self._corpus[split]
        tokens = text[where].astype(np.int64)
        position = np.broadcast_to(np.arange(1, self.length + 1), tokens[:, 1:].shape).copy()
        out = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].copy(), "position": position}
        if self.documents:
            files = np.searchsorted(starts, where, side="right")
            out["labels"][files[:, 1:] != files[:, :-1]] = IGNORE
            out["documents"] = files[:, :-1]
        return out
