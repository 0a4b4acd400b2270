"""Tokenizers of the Hugging Face format, and the imports of the extras."""

from __future__ import annotations

import hashlib
import importlib
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerzoo.spec import SpecError

PIECE = 2**18
"""Bytes of a document that are encoded at a time: encoding takes a hundred times its memory."""
BATCH = 2**24
"""Bytes that are encoded in one call, by all cores."""
NOWHERE = "is no file or folder here, nor to be had from Hugging Face"
QUIET = {
    "DATASETS_VERBOSITY": "critical",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "TOKENIZERS_PARALLELISM": "true",  # said, or it warns when loader processes start
}


EVALUATION = ("datasets", "lm_eval")
"""Modules of the eval extra; the others are of hf."""


def extra(module: str) -> Any:
    """A module of an extra, imported when it is first needed, and quiet.

    Raises:
        SpecError: it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        name = "eval" if module in EVALUATION else "hf"
        raise SpecError(f"needs the {name} extra: pip install 'layerzoo[{name}]'") from None


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return textwrap.shorten(line, 200, placeholder=" ..")


class Tokenizer:
    """Text, as bytes, to token ids and back. No special tokens are put around a text. `digest` is
    the SHA-256 of its file.

    Args:
        where: a tokenizer.json, a folder that holds one, or the Hugging Face id of a model that
            has one.

    Raises:
        SpecError: the extra is missing, or there is no tokenizer; the caller names the place.
    """

    def __init__(self, where: str) -> None:
        tokenizers = extra("tokenizers")
        text = _read(where)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            if type(error) is not Exception:  # what the library raises is of no class of its own
                raise
            raise SpecError(f"'{where}' is no tokenizer.json: {reason(error)}") from None
        self.tokenizer.no_truncation()  # some files bring the settings of a model's inputs
        self.tokenizer.no_padding()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        if not self.vocab_size:
            raise SpecError(f"'{where}' has no tokens")

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.integer[Any]]]:
        """The tokens of each document; what is not UTF-8 reads as U+FFFD.

        A document of more than `PIECE` bytes is encoded in pieces that end at line ends.
        """
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        tokens: list[list[NDArray[Any]]] = [[] for _ in documents]
        pieces = [(n, piece) for n, text in enumerate(documents) for piece in _pieces(text)]
        batch = np.cumsum([len(piece) for _, piece in pieces]) // BATCH
        for _, group in groupby(zip(batch, pieces, strict=True), lambda pair: pair[0]):
            owners, texts = zip(*(piece for _, piece in group), strict=True)
            encoded = self.tokenizer.encode_batch_fast(
                [text.decode(errors="replace") for text in texts], add_special_tokens=False
            )
            for n, encoding in zip(owners, encoded, strict=True):
                tokens[n].append(np.array(encoding.ids, dtype))
        return [np.concatenate([np.empty(0, dtype), *parts]) for parts in tokens]

    def encode_short(self, text: str) -> NDArray[np.integer[Any]]:
        """The tokens of a short text, in this thread: waking others takes longer."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Decodes tokens as they come: to a function called with the next ones, which returns
        the text that is complete with them."""
        stream = importlib.import_module("tokenizers.decoders").DecodeStream()
        return lambda ids: "".join(stream.step(self.tokenizer, token) or "" for token in ids)


def _read(where: str) -> str:
    """The contents of a tokenizer.json."""
    path = Path(where).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise SpecError(f"folder '{where}' holds no tokenizer.json")
    elif not path.is_file():
        if path.suffix == ".json":
            raise SpecError(f"there is no file '{where}'")
        hub = extra("huggingface_hub")
        try:
            path = Path(hub.hf_hub_download(where, "tokenizer.json"))
        except (OSError, hub.errors.HFValidationError) as error:
            raise SpecError(f"'{where}' {NOWHERE}: {reason(error)}") from None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"'{where}' is no tokenizer.json: it is not UTF-8") from None


def _pieces(text: bytes) -> Iterator[bytes]:
    low = 0
    while len(text) - low > PIECE:
        high = text.rfind(b"\n", low, low + PIECE) + 1 or low + PIECE
        yield text[low:high]
        low = high
    yield text[low:]
