"""Decays inside a chunk: of none, one a token, one a token and key channel.

Only ratios of at most 1 are ever computed, and no sum of decays is subtracted in low precision:
any decay is safe, from 1 to a full reset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import add_batched_matmul, batched_matmul

if TYPE_CHECKING:
    from jaxtyping import Float

FLOOR = -40.0
"""Log decays are clamped here: exp(-40) is below float64's resolution, and -inf, a full reset,
would make inf - inf."""


class StateGradients(NamedTuple):
    """Gradients that a segment's states have passed back before `Decays.backward`.

    d_rows: of the rows, which read the states.
    d_k: of the keys, which fade into the states.
    states: the states before the chunks.
    d_states: the gradients of the states after the chunks.
    """

    d_rows: Tensor
    d_k: Tensor
    states: Tensor
    d_states: Tensor


class Decays:
    """The decays of a segment's chunks: each factor is the product of D over some tokens. This is
    the one without decay, every factor 1.

    since: through token i, itself included, `[n, R, C, 1 | K]`. until: after token i through the
    chunk's last. whole: of the chunk, `[n, R, 1 | K, 1]`. ratio: after token j through token i.

    `scores` and `backward` compare the rows of `parts` queries, stacked as `[n, R, parts, C, K]`,
    with the keys: the first part sees its own token, the second only those before it.
    """

    since: Tensor | None = None
    until: Tensor | None = None

    def __init__(self, parts: int, like: Float[Tensor, "n R C K"]) -> None:
        ones = like.new_ones(parts, *like.shape[2:3] * 2)
        self.ratio = torch.stack([one.tril(-n) for n, one in enumerate(ones)])
        self.whole = like.new_ones(len(like), 1, 1, 1)

    def read(self, rows: Float[Tensor, "n R parts C K"]) -> Tensor:
        """The rows as they read the state from before the chunk."""
        return rows if self.since is None else rows * self.since.unsqueeze(2)

    def fade(self, x: Float[Tensor, "n R C K"]) -> Tensor:
        """What is left of each token's x at the end of the chunk."""
        return x if self.until is None else x * self.until

    def scores(self, rows: Tensor, k: Tensor) -> Float[Tensor, "n R parts C C"]:
        """scores[p, i, j] = sum_c rows[p, i, c] k[j, c] D_(j+1..i), zero where j is not seen."""
        flat = batched_matmul(rows.flatten(2, 3), k.mT)
        return flat.unflatten(2, rows.shape[2:4]).mul_(self.ratio)

    def backward(
        self, grad: Tensor, scores: Tensor, rows: Tensor, k: Tensor, into: StateGradients
    ) -> Float[Tensor, "n R C 1|K"] | None:
        """Add what `scores` passes back from its gradient to d_rows and d_k of `into`. Return the
        gradient of g, where there is one."""
        grad = (grad * self.ratio).flatten(2, 3)
        add_batched_matmul(into.d_rows.flatten(2, 3), grad, k)
        add_batched_matmul(into.d_k, grad.mT, rows.flatten(2, 3))
        return None


class TokenDecays(Decays):
    """One decay a token, from log decays g `[n, R, C, 1]`."""

    def __init__(self, g: Tensor, parts: int, like: Tensor) -> None:
        super().__init__(parts, like)
        # In float64, or mild decays after a strong one would lose the digits that it used up.
        wide = torch.float32 if g.device.type == "mps" else torch.float64  # mps has none
        total = g.to(wide).cumsum(-2)
        end = total[..., -1:, :]
        self.since, self.until, self.whole = (
            log.to(g.dtype).exp() for log in (total, end - total, end)
        )
        between = (total - total.mT).to(g.dtype).masked_fill_(self.ratio[0] == 0, -torch.inf)
        self.ratio = between.exp_().unsqueeze(2) * self.ratio

    def backward(
        self, grad: Tensor, scores: Tensor, rows: Tensor, k: Tensor, into: StateGradients
    ) -> Tensor | None:
        """The gradient of g_t is a sum over all factors that g_t is in: the ratio of i and j for
        j < t <= i, the reads of the tokens from t on, what is left of the tokens before t, and
        what is left of the state."""
        read = torch.linalg.vecdot(rows, into.d_rows).sum(2).unsqueeze(-1)
        left = torch.linalg.vecdot(k, into.d_k).unsqueeze(-1)
        whole = (into.states * into.d_states).sum((2, 3), keepdim=True) * self.whole
        from_t_on = torch.ones_like(grad[0, 0, 0]).triu()
        between = (from_t_on @ (grad * scores).sum(2)).tril(-1).sum(-1, keepdim=True)
        super().backward(grad, scores, rows, k, into)
        return between + from_t_on @ read + F.pad(left, (0, 0, 1, -1)).cumsum(2) + whole


class ChannelDecays(Decays):
    """One decay a token and key channel, from log decays g `[n, R, C, K]`.

    A ratio e^(g_i - g_j) cannot be split into e^(g_i) e^(-g_j), which overflows. Instead blocks
    of two halves are compared through the token between them: for i in the right half and j in
    the left one, D_(j+1..i) = D_(j+1..mid) D_(mid+1..i), both at most 1. Blocks of 2, 4, .. C
    tokens cover every pair once, and their sums are only ever added, never subtracted.
    """

    def __init__(self, g: Tensor) -> None:
        self.factors: list[Tensor] = []  # of blocks of 2, 4, .. C tokens: [n, R, blocks, 2, h, K]
        prefix, suffix = g, torch.zeros_like(g)
        while (h := 2 ** len(self.factors)) < g.shape[2]:
            prefix, suffix = (s.unflatten(2, (-1, 2, h)) for s in (prefix, suffix))
            self.factors.append(torch.stack((suffix[:, :, :, 0], prefix[:, :, :, 1]), 3).exp_())
            left, right = prefix[:, :, :, :, -1:].unbind(3)  # sums of whole halves
            prefix = torch.stack((prefix[:, :, :, 0], prefix[:, :, :, 1] + left), 3).flatten(2, 4)
            suffix = torch.stack((suffix[:, :, :, 0] + right, suffix[:, :, :, 1]), 3).flatten(2, 4)
        self.since, self.until = prefix.exp(), suffix.exp()
        self.whole = prefix[:, :, -1:].exp().mT

    def halves(self, rows: Tensor, k: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Decayed queries of right halves `[n, R, blocks, parts h, K]`, and keys of left ones."""
        h = factor.shape[4]
        right = rows.unflatten(3, (-1, 2, h))[:, :, :, :, 1].transpose(2, 3)
        left = k.unflatten(2, (-1, 2, h))[:, :, :, 0]
        return (right * factor[:, :, :, 1:]).flatten(3, 4), left * factor[:, :, :, 0]

    @staticmethod
    def blocks(scores: Tensor, h: int) -> Float[Tensor, "n R blocks parts h h"]:
        """The view of scores `[n, R, parts, C, C]` where right halves meet their left halves."""
        pairs = scores.unflatten(4, (-1, 2, h))[..., 0, :].unflatten(3, (-1, 2, h))[:, :, :, :, 1]
        return pairs.diagonal(dim1=3, dim2=5).permute(0, 1, 5, 2, 3, 4)

    def scores(self, rows: Tensor, k: Tensor) -> Tensor:
        out = rows.new_zeros(*rows.shape[:4], rows.shape[3])
        torch.linalg.vecdot(rows[:, :, 0], k, out=out[:, :, 0].diagonal(dim1=2, dim2=3))
        for factor in self.factors:
            right, left = self.halves(rows, k, factor)
            h = factor.shape[4]
            self.blocks(out, h).copy_(batched_matmul(right, left.mT).unflatten(3, (-1, h)))
        return out

    def backward(
        self, grad: Tensor, scores: Tensor, rows: Tensor, k: Tensor, into: StateGradients
    ) -> Tensor | None:
        """What the sums over a block get is handed down to its halves, to single tokens."""
        d_prefix = (rows * into.d_rows).sum(2)
        d_prefix[:, :, -1:] += (self.whole * into.states * into.d_states).sum(-1).unsqueeze(2)
        d_suffix = k * into.d_k
        own = grad[:, :, 0].diagonal(dim1=2, dim2=3).unsqueeze(-1)
        into.d_rows[:, :, 0].addcmul_(own, k)
        into.d_k.addcmul_(own, rows[:, :, 0])
        for factor in reversed(self.factors):
            right, left = self.halves(rows, k, factor)
            h = factor.shape[4]
            block = self.blocks(grad, h).flatten(3, 4)
            d_right, d_left = batched_matmul(block, left), batched_matmul(block.mT, right)
            d_prefix, d_suffix = (d.unflatten(2, (-1, 2, h)) for d in (d_prefix, d_suffix))
            of_left, of_right = d_prefix[:, :, :, 1].sum(3), d_suffix[:, :, :, 0].sum(3)
            d_prefix[:, :, :, 0, -1] += of_left
            d_prefix[:, :, :, 1, -1] += of_right
            d_prefix[:, :, :, 1] += (right * d_right).unflatten(3, (-1, h)).sum(3)
            d_suffix[:, :, :, 0].addcmul_(left, d_left)
            d_prefix, d_suffix = d_prefix.flatten(2, 4), d_suffix.flatten(2, 4)
            d_right = d_right.unflatten(3, (-1, h)).mul_(factor[:, :, :, 1:])
            into.d_rows.unflatten(3, (-1, 2, h))[:, :, :, :, 1].add_(d_right.transpose(2, 3))
            into.d_k.unflatten(2, (-1, 2, h))[:, :, :, 0].addcmul_(d_left, factor[:, :, :, 0])
        return d_prefix


def decays_of(g: Tensor | None, parts: int, like: Float[Tensor, "n R C K"]) -> Decays:
    """The decays of a segment with keys like `like`."""
    if g is None:
        return Decays(parts, like)
    return TokenDecays(g, parts, like) if g.shape[-1] == 1 else ChannelDecays(g)
