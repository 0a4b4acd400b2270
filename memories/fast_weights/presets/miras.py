"""Miras: memories with robust objectives, and weights that a norm or a divergence bounds."""

from __future__ import annotations

from typing import Any, Literal

from .. import MLP, FastWeights
from ..forgetting import KL, Lq


class Yaad(FastWeights, name="yaad"):
    """Yaad: an MLP with the Huber loss as objective, so that an outlier writes no more than a
    bounded step.

    W_t = (1 - decay_t) W_(t-1) - lr_t g_t,   o_t = M_(W_t)(q_t),   M(x) = x + LN(gelu(x W1) W2)

    where

    - W = (W1, W2) are the weights of a head, and LN's are learned outside;
    - g_t is the gradient of the Huber loss of M(k_t) - v_t, at the weights from the start of t's
      mini-batch;
    - lr_t and decay_t are gates of x_t.

    The paper makes delta an input-dependent gate and names its objective by cases of |e|_2 <=
    delta; here delta is a constant, applied per channel. Deviation: the layer has the shell that
    all memories share.
    """

    class Config(FastWeights.Config):
        network: Any = MLP(residual=True, layer_norm=True)
        objective: Any = "huber"
        forgetting: Any = "decay"

    source = "Behrouz et al. 2025, arXiv 2504.13173"
    cases = ({"heads": 2, "mini_batch": 5, "objective": {"name": "huber", "delta": 0.3}},)


class Moneta(FastWeights, name="moneta"):
    """Moneta: an MLP with an l_p objective, whose weights an l_q norm bounds.

    A <- (product of 1 - decay_t) A - sum_t lr_t g_t,   W = A / max(|A|_q, 1)^(q - 2),
    M(x) = x + LN(gelu(x W1) W2)

    where

    - W = (W1, W2) are the weights of a head, A is their master copy, and q = 4;
    - g_t is the gradient of sum |M(k_t) - v_t|^p, p = 3, at the W from before the mini-batch;
    - lr_t and decay_t are gates of x_t, and LN's weights are learned outside.

    A is written once a mini-batch, and its tokens read the W from before. In the paper A advances
    at every token. A read of its own write would need W of every token, which is not linear in A,
    so we write by the chunk. The bound of 1 is ours (`lq`). Deviation: the layer has the shell
    that all memories share.
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

    A <- (product of 1 - decay_t) A - sum_t lr_t g_t,   W = softmax(A),
    M(x) = x + LN(gelu(x W1) W2)

    where

    - W = (W1, W2) are the weights of a head: the softmax runs over the inputs of each output;
    - A is their master copy, log W up to a constant;
    - g_t is the gradient of |M(k_t) - v_t|^2 / 2 at the W from before the mini-batch;
    - lr_t and decay_t are gates of x_t, and LN's weights are learned outside.

    A is written once a mini-batch, and its tokens read the W from before (as in `moneta`). The KL
    divergence to the old weights is the price of a write. The paper leaves open over which entries
    a distribution runs. Deviation: the layer has the shell that all memories share.
    """

    class Config(FastWeights.Config):
        network: Any = MLP(residual=True, layer_norm=True)
        forgetting: Any = KL(decay=True)
        place: Literal["end", "start", "view"] = "view"
        update: Literal["token", "chunk"] = "chunk"
        lr: float = 0.7

    source = "Behrouz et al. 2025, arXiv 2504.13173"
    cases = ({"heads": 2, "mini_batch": 5},)
