"""LaCT: a gated network, written in large chunks by plain gradient descent, with a fixed norm."""

from __future__ import annotations

from typing import Any, Literal

from .. import GLU, FastWeights
from ..forgetting import Norm


class LaCT(FastWeights, name="lact"):
    """LaCT: a gated network, written once a large mini-batch, whose norm is restored after it.

    S = mean(momentum) S - sum_j lr_j g_j,   W = norm(W + S),   o_t = M_W(q_t) before the write,
    M(x) = (silu(x W0) * (x W2)) W1

    where

    - W = (W0, W1, W2) are the weights of a head, with a hidden width of 2 K;
    - g_j is the gradient of L = -<M(k_j), v_j> at the W from before the chunk;
    - norm returns every output's weights to the norm that they had at the start, with |W| + 1e-5
      in the divisor;
    - lr_j, one for every matrix, and momentum_j are gates of x_j.

    `optimiser: {name: muon, momentum: true}` is the paper's variant with Newton-Schulz on the
    step. `place: view` is its prenorm variant, which keeps a master copy.

    The authors' code reads the last chunk without writing it and starts to decode from the initial
    weights; here a chunk is written when it is full, and decoding goes on. Its chunks have 2048
    tokens and more; the default of 512 here fills at shorter training lengths. Deviation: the
    layer has the shell that all memories share.
    """

    class Config(FastWeights.Config):
        network: Any = GLU()
        objective: Any = "dot"
        optimiser: Any = "momentum"
        forgetting: Any = Norm(eps=1e-5)
        update: Literal["token", "chunk"] = "chunk"
        mini_batch: int = 512
        lr_per_matrix: bool = True
        lr: float = 0.7

    source = "Zhang et al. 2025, arXiv 2505.23884"
    cases = (
        {"heads": 2, "mini_batch": 5},
        {"heads": 3, "mini_batch": 6, "optimiser": {"name": "muon", "momentum": True}},
        {"heads": 2, "mini_batch": 4, "place": "view", "optimiser": "muon"},
    )
