"""AllMem's memory: a gated network beside a sliding window, normalised before every write."""

from __future__ import annotations

from typing import Any, Literal

from .. import GLU, FastWeights


class AllMem(FastWeights, name="allmem"):
    """AllMem's memory: a gated network, written once a mini-batch, whose norm is restored before
    every write.

    1. o_t = M_W(q_t) for the tokens of the chunk, with W as the last write left it;
    2. W <- norm(W): every output's weights return to the norm that they had at the start;
    3. S = mean(momentum) S - sum_j lr_j g_j,   W <- W + S

    where

    - M(x) = x + (silu(x W0) * (x W2)) W1, and W = (W0, W1, W2) are the weights of a head;
    - g_j is the gradient of |M(k_j) - v_j|^2 / 2 at the W of 2;
    - lr_j and momentum_j are gates of x_j.

    AllMem has this memory beside a window: `parallel` with children `sliding` and `allmem`, and a
    learned scale per channel that starts at 0. There is no public code. This is our reading of the
    paper's text and figures, which order read, norm and write so. The paper ablates neither the
    order nor the norm, the momentum or the chunk size. `place: end` normalises after the write (as
    LaCT does), forgetting `none` does not normalise, and `decay` fades.

    Deviations: the layer has the shell that all memories share (projections to q, k, v of its
    own). q and k have unit length, which is the paper's RMS norm (`qk_norm: rms`) but for a
    factor; with that norm recall was learned less reliably. A chunk has 512 tokens by default.
    """

    class Config(FastWeights.Config):
        network: Any = GLU(residual=True)
        optimiser: Any = "momentum"
        forgetting: Any = "norm"
        place: Literal["end", "start", "view"] = "start"
        update: Literal["token", "chunk"] = "chunk"
        mini_batch: int = 512
        lr: float = 0.6

    source = "AllMem, arXiv 2602.13680"
    cases = (
        {"heads": 2, "mini_batch": 5},
        {"heads": 3, "mini_batch": 1, "forgetting": {"name": "norm", "decay": True}},
        {"heads": 2, "mini_batch": 6, "place": "end", "optimiser": "sgd"},
    )
