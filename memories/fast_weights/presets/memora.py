"""Memora: a memory of Miras whose weights are distributions."""

from __future__ import annotations

from typing import Any, Literal

from .. import MLP, FastWeights
from ..forgetting import KL


class Memora(FastWeights, name="memora"):
    """Memora: an MLP whose weights are distributions, held near the old ones by a KL divergence.

    M(x) = x + LN(gelu(x W1) W2) on L = |M(k) - v|^2 / 2, with a KL divergence to the old
    weights as the price of a write:

    A <- (product of 1 - decay_t) A - sum_t lr_t g_t,   W = softmax(A) over the inputs of an output

    A = log W up to a constant. Once a mini-batch; its tokens read the W from before, at which g_t
    is taken (as in `moneta`). The paper leaves open over which entries a distribution runs.
    Deviations: one shell for all memories.
    """

    class Config(FastWeights.Config):
        network: Any = MLP(residual=True, layer_norm=True)
        forgetting: Any = KL(decay=True)
        place: Literal["end", "start", "view"] = "view"
        update: Literal["token", "chunk"] = "chunk"
        lr: float = 0.7

    source = "Behrouz et al. 2025, arXiv 2504.13173"
    cases = ({"heads": 2, "mini_batch": 5},)
