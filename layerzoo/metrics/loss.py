"""Cross entropy of tokens: mean, and by position."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from layerzoo.metrics.binned import Binned, octaves
from layerzoo.metrics.wide import WideMetric, exp, nats, ratio


class TokenLoss(WideMetric):
    """Mean cross entropy: `loss/held_out` in nats a token, `loss/perplexity` = exp of it, and for
    text `loss/bits_per_byte` = nats / ln 2 / bytes a token.

    Args:
        bytes_per_token: mean bytes of a token of the text; 0 is no text.
    """

    total: Tensor
    count: Tensor

    def __init__(self, bytes_per_token: float = 0) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token
        self.add_sums("total")
        self.add_counts("count")

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        self.total += nats(logits, labels).sum(dtype=self.total.dtype)
        self.count += len(labels)

    def compute(self) -> dict[str, float]:
        loss = ratio(self.total.item(), self.count.item())
        out = {"loss/held_out": loss, "loss/perplexity": exp(loss)}
        if self.bytes_per_token:
            out["loss/bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return out


class LossByPosition(Binned):
    """Loss of the tokens at positions [2^n, 2^(n+1)), counted from 1 (annotation `position`), in
    nats as `loss_at/2^n`; as `perplexity_at/2^n`; for text in bits a byte, `bits_per_byte_at/2^n`.

    Args:
        length: the longest position. bytes_per_token: see `TokenLoss`.
    """

    def __init__(self, length: int, bytes_per_token: float = 0) -> None:
        super().__init__("loss_at", "position", octaves(length))
        self.bytes_per_token = bytes_per_token

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nats(logits, labels)

    def compute(self) -> dict[str, float]:
        means = {edge: mean for edge, (_, mean) in self.means().items()}
        out = {f"loss_at/{edge}": loss for edge, loss in means.items()}
        out |= {f"perplexity_at/{edge}": exp(loss) for edge, loss in means.items()}
        if self.bytes_per_token:
            bits = math.log(2) * self.bytes_per_token
            out |= {f"bits_per_byte_at/{edge}": loss / bits for edge, loss in means.items()}
        return out
