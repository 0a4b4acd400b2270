"""The parts of the chunk forms that are written to be read, in plain autograd.

The fast forms compute the same with fewer operations, and without ever dividing by a decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

FULL_RESET = -40.0
"""A log decay of -inf, which forgets everything, counts as this: -inf - -inf is no number."""


def chunks(size: int, *tensors: Float[Tensor, "B T H D"]) -> Iterator[list[Tensor]]:
    """The tensors of each chunk of `size` tokens, `[B, H, C, D]`; the last may be shorter."""
    for pieces in zip(*(x.split(size, dim=1) for x in tensors), strict=True):
        yield [piece.transpose(1, 2) for piece in pieces]


class ChunkDecays(NamedTuple):
    """How much of a key channel is left between two tokens of a chunk.

    since_start: from before the chunk until token i, which decays, too.
    until_end: from after token j until the last token.
    between: from after token j until token i; 0 where j comes after i.
    """

    since_start: Float[Tensor, "B H C K"]
    until_end: Float[Tensor, "B H C K"]
    between: Float[Tensor, "B H C C K"]


def chunk_decays(log_decay: Float[Tensor, "B H C K"]) -> ChunkDecays:
    """The decays of a chunk from the logarithm of each token's decay."""
    total = log_decay.clamp(min=FULL_RESET).cumsum(dim=2)
    seen = torch.ones(*total.shape[2:3] * 2, dtype=torch.bool, device=total.device).tril()
    between = total.unsqueeze(3) - total.unsqueeze(2)  # token i, then token j
    between = between.masked_fill(~seen[:, :, None], -torch.inf)
    return ChunkDecays(total.exp(), (total[:, :, -1:] - total).exp(), between.exp())
