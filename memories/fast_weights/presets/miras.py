"""Miras: memories with robust objectives, and weights that a norm or a divergence bounds."""

from __future__ import annotations

from typing import Any, Literal

from .. import MLP, FastWeights
from ..forgetting import KL, Lq


class Yaad(FastWeights, name="yaad"):
    """Yaad: an MLP with the Huber loss as objective, so that an outlier writes no more than a
    bounded step.

    M(x) = x + LN(gelu(x W1) W2) on the Huber loss of M(k) - v, so that an outlier moves the
    weights no further than its sign.

    W_t = (1 - decay_t) W_(t-1) - lr_t g_t,   o_t = M_(W_t)(q_t)

    g_t: gradient at the weights from the start of t's mini-batch. The paper makes delta an
    input-dependent gate and names its objective by cases of |e|_2 <= delta; here delta is a
    constant, applied per channel. Deviations: one shell for all memories.
    """

    class Config(FastWeights.Config):
        network: Any = MLP(residual=True, layer_norm=True)
        objective: Any = "huber"
        forgetting: Any = "decay"

    source = "Behrouz et al. 2025, arXiv 2504.13173"
    cases = ({"heads": 2, "mini_batch": 5, "objective": {"name": "huber", "delta": 0.3}},)


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
