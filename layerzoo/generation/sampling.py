"""How the next token is chosen: temperature, top-k, top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    temperature: 0 is greedy; else logits are divided by it and sampled.
    top_k: only the k likeliest tokens. top_p: only the likeliest tokens that together reach this
    probability, at least one (of what top_k leaves, at the temperature; Holtzman et al. 2019,
    arXiv 1904.09751). Of tokens that are equally likely the lower id comes first.

    Raises:
        SpecError: a value that is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise SpecError(f"temperature: must be finite and >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise SpecError(f"top_k: must be at least 1, or none, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SpecError(f"top_p: must be in (0, 1], or none, got {self.top_p}")

    def kept(self, logits: Float[Tensor, "B vocab"]) -> Bool[Tensor, "B vocab"]:
        """The tokens that may be sampled."""
        order = logits.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(logits, dtype=torch.bool)
        if self.top_k is not None:
            keep[:, self.top_k :] = False
        if self.top_p is not None:
            scaled = (order.values.double() / self.temperature).masked_fill(~keep, -math.inf)
            p = scaled.softmax(-1)
            before = p.cumsum(-1) - p
            keep &= before < self.top_p
            keep[:, 0] = True
        return torch.zeros_like(keep).scatter(-1, order.indices, keep)

    def choose(
        self, logits: Float[Tensor, "B vocab"], draws: Sequence[float]
    ) -> Int[Tensor, " B"]:
        """A token of every row.

        Args:
            draws: a number in [0, 1) per row. Its token is where the distribution function, over
                the ids in order, first exceeds it: a row depends on nothing but its own draw.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled = logits.double() / self.temperature
        if self.top_k is not None or self.top_p is not None:
            scaled = scaled.masked_fill(~self.kept(logits), -math.inf)
        total = scaled.softmax(-1).cumsum(-1)
        total = total / total[:, -1:]  # ends in exactly 1, above any draw
        u = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        return torch.searchsorted(total, u[:, None], right=True)[:, 0]
