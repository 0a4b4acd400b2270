"""TTT: a linear map or an MLP with LayerNorm, trained on its reconstruction error."""

from __future__ import annotations

from typing import Any

from .. import MLP, FastWeights, LinearNetwork


class TTTLinear(FastWeights, name="ttt_linear"):
    """TTT-Linear: a linear map with LayerNorm, trained on its reconstruction error.

    W_i = W_0 - row_i sum_(j <= i) lr_j g_j,   o_i = M_(W_i)(q_i),
    row_i = max(0, 1 / i + learned),   M(x) = x + LN(x W + b)

    where

    - i and j are places in a mini-batch of 16 tokens, and W_0 are the weights from its start;
    - g_j is the gradient of L = |M(k_j) - v_j|^2 / 2 at W_0;
    - lr_j is a gate of x_j;
    - LN has a weight and a bias per head, which are learned outside.

    L is the paper's |LN(k W + b) - (v - k)|^2 / 2, and o its q + LN(q W + b).

    The factor row, by which a mini-batch's step is a mean, is in the authors' code and not in the
    paper's text. Their rate is base / K sigmoid(x w); ours is the same for qk_norm rms or none,
    and for unit keys base sigmoid(x w). Deviations: the layer has the shell that all memories
    share (no rotary embedding of q and k, no convolution of its own), and W starts with the scale
    of a linear layer, not at 0.02.
    """

    class Config(FastWeights.Config):
        network: Any = LinearNetwork(bias=True, layer_norm=True, residual=True)
        row: bool = True

    source = "Sun et al. 2024, arXiv 2407.04620"
    cases = ({"heads": 2, "mini_batch": 5}, {"heads": 3, "mini_batch": 6, "qk_norm": "rms"})


class TTTMLP(FastWeights, name="ttt_mlp"):
    """TTT-MLP: TTT-Linear with an MLP of two layers inside.

    W_i = W_0 - row_i sum_(j <= i) lr_j g_j,   o_i = M_(W_i)(q_i),
    row_i = max(0, 1 / i + learned),   M(x) = x + LN(gelu(x W1 + b1) W2 + b2)

    where

    - the hidden width is 4 K, and GELU is taken by its approximation with tanh;
    - i, j, W_0, g_j, lr_j and LN are those of `ttt_linear`.

    The authors' base rate is a tenth of TTT-Linear's; here rates are relative to the width of the
    hidden layer, and the same. Deviations: as `ttt_linear`.
    """

    class Config(FastWeights.Config):
        network: Any = MLP(bias=True, layer_norm=True, residual=True, activation="gelu_tanh")
        row: bool = True

    source = "Sun et al. 2024, arXiv 2407.04620"
    cases = (
        {"heads": 2, "mini_batch": 5},
        {"heads": 4, "mini_batch": 6, "lr_per_matrix": True, "out_gate": "silu"},
    )
