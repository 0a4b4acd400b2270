"""Which rules of fast weights keep their weights bounded, whatever is written."""

from __future__ import annotations

from layerzoo.spec import SpecError

from .networks import GLU, LinearNetwork
from .objectives import Dot
from .optimisers import Muon
from .rule import Rule

BOUND = "a network with layer_norm, forgetting norm, lq or kl, or optimiser muon"
"""Each of these bounds the error, the weights or the step."""


def check_bounded(rule: Rule, qk_norm: str, lr_per_matrix: bool) -> None:
    """Refuse a rule that no learning rate makes stable.

    A step on a linear network with the l2 objective is stable up to a rate of 2 / |k|^2, as in a
    delta rule. There is no such rate in four cases. The loss grows faster than a square. The loss
    has no minimum, and the network multiplies matrices with each other. Keys may have any length.
    The network is a glu, which multiplies two maps of the key, and its keys are not of unit length
    or its matrices have rates of their own.

    Raises:
        SpecError: the weights grow without bound.
    """
    network, objective = rule.network, rule.objective
    if network.layer_norm or rule.forgetting.nonlinear or isinstance(rule.optimiser, Muon):
        return
    if objective.order > 1:
        raise SpecError(
            f"objective '{objective.name}' needs {BOUND}: its gradient grows faster than the "
            f"error, so that a large error writes a larger one; or use huber"
        )
    deep = not isinstance(network, LinearNetwork)
    if deep and isinstance(objective, Dot):
        raise SpecError(
            f"objective 'dot' of network '{network.name}' needs {BOUND}: it has no minimum, and "
            f"matrices that multiply each other grow ever faster"
        )
    if qk_norm == "none" and (deep or objective.order):
        raise SpecError(
            f"qk_norm: 'none' needs {BOUND}: no rate is stable for keys of any length; use l2"
        )
    if isinstance(network, GLU) and objective.order:
        if qk_norm != "l2":
            raise SpecError(
                f"qk_norm: '{qk_norm}' of network 'glu' needs {BOUND}: a product of two maps of "
                f"the key is stable for keys of unit length only; use l2"
            )
        if lr_per_matrix:
            raise SpecError(
                f"lr_per_matrix: of network 'glu' needs {BOUND}: at rates of their own the "
                f"matrices of a product overshoot together"
            )
