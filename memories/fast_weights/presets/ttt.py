"""TTT: a linear map or an MLP with LayerNorm, trained on its reconstruction error."""

from __future__ import annotations

from typing import Any

from .. import MLP, FastWeights, LinearNetwork


class TTTLinear(FastWeights, name="ttt_linear"):
    """TTT-Linear: a linear map with LayerNorm, trained on its reconstruction error.

    M(x) = x + LN(x W + b), one gradient step a token on L = |M(k) - v|^2 / 2.

    W_i = W_0 - row_i sum_(j <= i) lr_j g_j,  o_i = M_(W_i)(q_i),  row_i = max(0, 1 / i + learned)

    i, j: places in a mini-batch of 16; g_j: gradient at W_0, the weights from its start. L is the
    paper's |LN(k W + b) - (v - k)|^2 / 2, and o its q + LN(q W + b). LN has a weight and a bias
    per head, learned outside.

    As the authors' code, not the paper's text: the factor row, by which a mini-batch's step is a
    mean. Its rate is base / K sigmoid(x w); ours is the same for qk_norm rms or none, and for unit
    keys base sigmoid(x w). Deviations: one shell for all memories (no rotary embedding of q and k,
    no convolution of their own); W starts with the scale of a linear layer, not at 0.02.
    """

    class Config(FastWeights.Config):
        network: Any = LinearNetwork(bias=True, layer_norm=True, residual=True)
        row: bool = True

    source = "Sun et al. 2024, arXiv 2407.04620"
    cases = ({"heads": 2, "mini_batch": 5}, {"heads": 3, "mini_batch": 6, "qk_norm": "rms"})


class TTTMLP(FastWeights, name="ttt_mlp"):
    """TTT-MLP: TTT-Linear with an MLP of two layers inside.

    M(x) = x + LN(gelu(x W1 + b1) W2 + b2), hidden width 4 K, GELU by tanh; all as `ttt_linear`.

    W_i = W_0 - row_i sum_(j <= i) lr_j g_j,  o_i = M_(W_i)(q_i),  row_i = max(0, 1 / i + learned)

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
