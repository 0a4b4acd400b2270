"""Rule: a point in the space of fast weights, the axes crossed, and what is ill-defined in it."""

from __future__ import annotations

import functools
from typing import Any, Literal

from layerzoo.spec import Config, SpecError, error_at

from .forgetting import ForgettingRule, Mapped
from .gates import Gates, token_gates
from .networks import Network
from .objectives import Objective
from .optimisers import Muon, Optimiser

AXES: dict[str, Any] = {
    "network": Network,
    "objective": Objective,
    "optimiser": Optimiser,
    "forgetting": ForgettingRule,
}


class Rule(Config):
    """How a small network M_W is trained while the sequence is read. Each of the first four fields
    is a name, or a mapping of a name and fields of its own.

    Raises:
        SpecError: an unknown option, or a combination that has no meaning.
    """

    network: Any = "mlp"
    """The network is linear, mlp (which takes depth, expansion, activation) or glu (expansion).
    All take bias, residual and layer_norm."""
    objective: Any = "l2"
    """The loss of M(k) against v is dot, l2, huber (which takes delta) or lp (p)."""
    optimiser: Any = "sgd"
    """The optimiser is sgd, momentum, or muon (which takes momentum and eps)."""
    forgetting: Any = "none"
    """The weights forget by none, decay, norm, lq or kl. The last three take decay, too; norm also
    takes eps, and lq takes q."""
    place: Literal["end", "start", "view"] = "end"
    """norm, lq and kl act at the end of the mini-batch (after the write), at its start (reads see
    the raw weights, gradients and writes the mapped ones), or as a view (a master copy is
    kept)."""
    mini_batch: int = 16
    """The gradients of so many tokens are all taken at the weights before the first of them."""
    update: Literal["token", "chunk"] = "token"
    """With token a token reads its own write. With chunk the mini-batch is written in one step
    when it is full, and its tokens read the weights from before."""

    def check(self) -> None:
        for name, axis in AXES.items():
            with error_at(name):
                object.__setattr__(self, name, axis.of(getattr(self, name)))
        if self.mini_batch < 1:
            raise SpecError(f"mini_batch: must be at least 1, got {self.mini_batch}")
        forgetting, name = self.forgetting, self.forgetting.name
        if isinstance(self.optimiser, Muon):
            if self.update == "token":
                raise SpecError(
                    "optimiser 'muon' needs update 'chunk': it acts on the step of a mini-batch"
                )
            if self.network.bias:
                raise SpecError(
                    "optimiser 'muon' is not defined for a network with bias: a bias is no matrix"
                )
        if not isinstance(forgetting, Mapped):
            if self.place != "end":
                raise SpecError(
                    f"place '{self.place}' does nothing with forgetting '{name}'; leave it out"
                )
            return
        if forgetting.dual and self.place != "view":
            raise SpecError(
                f"forgetting '{name}' needs place 'view': it reads the weights off a master copy "
                f"that adds up the writes"
            )
        if self.update == "token" and self.place != "end":
            raise SpecError(
                f"place '{self.place}' needs update 'chunk': with 'token' a token reads weights "
                f"that must be linear in the writes so far"
            )
        if name == "norm" and self.network.bias:
            raise SpecError(
                "forgetting 'norm' is not defined for a network with bias: a norm would mix an "
                "output's bias with its weights"
            )

    def token_gates(self, *gates: Any) -> list[Gates]:
        """What the gates of n tokens make of the state and the writes, with `update: token`: see
        `token_gates`. Kernels, which import no rule, take it from here."""
        return token_gates(*gates)

    @functools.cached_property
    def has_momentum(self) -> bool:
        return self.optimiser.has_momentum

    @functools.cached_property
    def has_decay(self) -> bool:
        return self.forgetting.has_decay

    @functools.cached_property
    def spares_initial(self) -> bool:
        """The first mini-batch uses the initial weights as they are: before the first write `norm`
        has nothing to mend (it matters where eps is not 0). A dual map acts at once."""
        return self.forgetting.nonlinear and self.place != "end" and not self.forgetting.dual
