"""Moneta: a memory of Miras with an l_p objective and an l_q link."""

from __future__ import annotations

from typing import Any, Literal

from .. import MLP, FastWeights
from ..forgetting import Lq


class Moneta(FastWeights, name="moneta"):
    """Moneta: an MLP with an l_p objective, whose weights an l_q norm bounds.

    M(x) = x + LN(gelu(x W1) W2) on L = sum |M(k) - v|^p, p = 3.

    A <- (product of 1 - decay_t) A - sum_t lr_t g_t,   W = A / max(|A|_q, 1)^(q - 2),   q = 4

    once a mini-batch; its tokens read the W from before, at which g_t is taken. In the paper A
    advances at every token; a read of its own write would need W of every token, which is not
    linear in A, so we write by the chunk. The bound of 1 is ours (`lq`). Deviations: one shell for
    all memories.
    """

    class Config(FastWeights.Config):
        network: Any = MLP(residual=True, layer_norm=True)
        objective: Any = "lp"
        forgetting: Any = Lq(decay=True)
        place: Literal["end", "start", "view"] = "view"
        update: Literal["token", "chunk"] = "chunk"
        lr: float = 0.3

    source = "Behrouz et al. 2025, arXiv 2504.13173"
    cases = ({"heads": 2, "mini_batch": 5}, {"heads": 3, "mini_batch": 1, "objective": "l2"})
