"""The compression task of MAD, and its readout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerzoo.data.mad_recall import MadTask
from layerzoo.data.random import below, bits
from layerzoo.data.task import IGNORE, SPLITS, Arrays
from layerzoo.nn import RMSNorm
from layerzoo.spec import require

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel


class Compression(MadTask):
    """Compression: random tokens and then the compression token, from whose hidden state alone
    all the tokens are to be told.

    Tokens are 0..V-2, drawn with replacement; the last is V-1. The label at each position but
    the last is that position's own token: the task's readout, an MLP, predicts it from the hidden
    state of the *last* position and the number of its own. Annotation `lag` is the distance from
    the token to the last position, and `reachable` whether that position reaches it. Chance is a
    guess among V-1 tokens. Source: Poli et al. 2024, arXiv 2403.17844; the defaults are its
    baseline's. There the compression token, too, is to be told.
    """

    class Config(MadTask.Config):
        vocab_size: int = 16
        """V counts the compression token, too."""
        length: int = 32
        """A sample has T tokens."""

        def check(self) -> None:
            super().check()
            require(self.vocab_size >= 3, f"vocab_size: must be at least 3, got {self.vocab_size}")
            require(self.length >= 2, f"length: must be at least 2, got {self.length}")

    cases = ({"vocab_size": 5, "length": 16},)

    @property
    def chance(self) -> float:
        """The accuracy of guessing a token."""
        return 1 / (self.vocab_size - 1)

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        T, last = self.length, self.length - 1
        key, at = (self.seed, SPLITS.index(split), index[:, None]), np.arange(T)
        tokens = below(self.vocab_size - 1, bits(*key, 0, at))
        tokens[:, last] = self.vocab_size - 1
        labels = np.where(at < last, tokens, IGNORE)
        lag = np.broadcast_to(last - at, tokens.shape).copy()
        reachable = (at < last) & self.reachable(last, at)
        return {
            "tokens": tokens,
            "labels": labels,
            "lag": lag,
            "reachable": np.broadcast_to(reachable, tokens.shape).copy(),
        }

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        """The compression token; the tokens are what is to be remembered."""
        return sample["tokens"] == self.vocab_size - 1

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens themselves: the difficulty lies in the readout, not in the answer."""
        return tokens

    def readout(self, model: LanguageModel) -> nn.Module:
        return LastState(model.config.dim, self.vocab_size)


class LastState(nn.Module):
    """Logits at each labelled position from the last hidden state and that position alone."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            RMSNorm(dim),
            nn.Linear(dim, dim),
            nn.GELU(),
            RMSNorm(dim),
            nn.Linear(dim, dim),
            nn.GELU(),
            RMSNorm(dim),
            nn.Linear(dim, vocab_size),
        )

    def forward(self, h: Tensor, where: Tensor) -> Tensor:
        """h: hidden states `[B, T, D]`. where: labelled positions, bool `[B, T]`. Returns logits
        `[N, vocab]`."""
        row, position = where.nonzero(as_tuple=True)
        return self.mlp(h[row, -1] + sinusoids(position, h.shape[-1]).to(h.dtype))


def sinusoids(position: Tensor, dim: int) -> Tensor:
    """The position embedding of Vaswani et al. 2017, `[N, dim]`; it knows no longest length."""
    n = torch.arange(dim, device=position.device)
    angle = position[:, None] / 10_000 ** (n // 2 * 2 / dim)
    return torch.where(n % 2 == 0, angle.sin(), angle.cos())
