"""Titans' neural memory: an MLP trained with momentum, and a decay of its weights."""

from __future__ import annotations

from typing import Any

from layerzoo.layer import Reduction

from .. import MLP, FastWeights
from ..layer import silence


class Titans(FastWeights, name="titans"):
    """Titans' neural memory: an MLP trained with momentum, whose weights decay.

    S_t = momentum_t S_(t-1) - lr_t g_t,   W_t = (1 - decay_t) W_(t-1) + S_t,   o_t = M_(W_t)(q_t),
    M(x) = gelu(x W1) W2

    where

    - W = (W1, W2) are the weights of a head, with a hidden width of 4 K;
    - g_t is the gradient of |M(k_t) - v_t|^2 / 2 at the weights from the start of t's mini-batch;
    - momentum_t (the paper's eta, past surprise), lr_t (theta) and decay_t (alpha) are gates of
      x_t.

    S and W advance at every token.

    The paper leaves open the depth (its ablation takes two layers or more), whether gates are per
    channel (here they are per head), and the initial weights (learned here). Its objective has no
    1/2, so that our rates are twice its own. The gradient is taken before the decay: a depth of 1
    is gated delta only up to rescaled rates and values. Deviation: the layer has the shell that
    all memories share.
    """

    class Config(FastWeights.Config):
        network: Any = MLP()
        optimiser: Any = "momentum"
        forgetting: Any = "decay"
        lr: float = 0.5

    source = "Behrouz et al. 2025, arXiv 2501.00663"
    cases = (
        {"heads": 2, "mini_batch": 5},
        {"heads": 3, "mini_batch": 1, "network": {"name": "mlp", "depth": 3, "expansion": 1.5}},
    )
    reductions = (
        Reduction({"optimiser": "momentum"}, {"optimiser": "sgd"}, silence("momentum")),
        Reduction({"forgetting": "decay"}, {"forgetting": "none"}, silence("decay")),
    )
