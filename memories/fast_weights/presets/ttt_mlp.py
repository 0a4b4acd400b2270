"""TTT-MLP: TTT-Linear with an MLP of two layers inside."""

from __future__ import annotations

from typing import Any

from .. import MLP, FastWeights


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
