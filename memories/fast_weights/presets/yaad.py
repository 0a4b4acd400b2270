"""Yaad: a memory of Miras with a robust objective."""

from __future__ import annotations

from typing import Any

from .. import MLP, FastWeights


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
