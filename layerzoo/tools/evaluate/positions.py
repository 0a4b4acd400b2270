"""Loss by position on held-out files, and what share of a gap a memory recovers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from layerzoo.data.corpus import deal, read_files
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.metrics.wide import nats
from layerzoo.spec import SpecError

HEAD = 256
"""Positions whose logits are held at a time."""

Losses = NDArray[np.float64]


class Share(NamedTuple):
    """A share of a gap over files, and half of its 95% interval (jackknife over files)."""

    value: float
    half: float


def held_out(
    patterns: Sequence[str], share: float, length: int, count: int, tokenizer: Tokenizer
) -> dict[str, list[NDArray[Any]]]:
    """The first length + 1 tokens of held-out files, by pattern.

    The files are those that a `Text` of all these patterns and the same `held_out` does not train
    on: its val and test splits. Files that are too short are left out.

    Raises:
        SpecError: none is long enough.
    """
    dealt = deal(read_files(list(patterns)), share, ["val", "test"])
    found: dict[str, list[NDArray[Any]]] = {}
    for pattern in patterns:
        own = read_files([pattern])
        rows = []
        for name, text in (*dealt["val"], *dealt["test"]):
            if name in own and len(rows) < count and len(text) > length:
                (tokens,) = tokenizer.encode([text])
                if len(tokens) > length:
                    rows.append(tokens[: length + 1].astype(np.int64))
        if not rows:
            raise SpecError(
                f"--text {pattern}: no held-out file has {length + 1} tokens; give a smaller "
                f"--length, or a larger --held_out if you trained with it"
            )
        found[pattern] = rows
    return found


@torch.no_grad()
def losses(model: Any, tokens: Tensor) -> Losses:
    """Nats at each position of rows `[B, T + 1]` of tokens -> `[B, T]`."""
    h, _ = model.hidden(tokens[:, :-1])
    parts = [
        nats(model.head(part).flatten(0, 1), want.flatten()).view(want.shape)
        for part, want in zip(h.split(HEAD, 1), tokens[:, 1:].split(HEAD, 1), strict=True)
    ]
    return torch.cat(parts, 1).double().cpu().numpy()


def ranges(window: int, length: int) -> dict[str, slice]:
    """Where losses are averaged: inside the window, past it, and in the second half."""
    found = {"inside": slice(0, window), "past window": slice(window, length)}
    if length // 2 > window:
        found[f"past {length // 2:,}"] = slice(length // 2, length)
    return {name: where for name, where in found.items() if where.start < length}


def recovered(full: Losses, window: Losses, other: Losses) -> Share:
    """(window - other) / (window - full), each the mean over files of the mean loss `[files]`.

    The interval is the jackknife's over files; without two files it is not a number.
    """

    def ratio(keep: NDArray[np.bool_]) -> float:
        gap = (window - full)[keep].mean()
        return float((window - other)[keep].mean() / gap)

    n = len(full)
    value = ratio(np.ones(n, bool))
    if n < 2:
        return Share(value, float("nan"))
    left = np.array([ratio(np.arange(n) != out) for out in range(n)])
    error = np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())
    return Share(value, float(stats.t.ppf(0.975, n - 1) * error))


def difference(a: Losses, b: Losses) -> Share:
    """Mean of a - b over files, and half of its paired 95% t interval."""
    d = a - b
    if len(d) < 2:
        return Share(float(d.mean()), float("nan"))
    error = d.std(ddof=1) / np.sqrt(len(d))
    return Share(float(d.mean()), float(stats.t.ppf(0.975, len(d) - 1) * error))
