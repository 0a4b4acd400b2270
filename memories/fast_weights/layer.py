"""The layer of all fast weights; a preset is a subclass with other defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from layerzoo.layer import State, StateBytes
from layerzoo.memory import Memory, present
from layerzoo.nn import Constant, wide
from layerzoo.spec import SpecError

from .bounds import check_bounded
from .diagnostics import Log
from .op import OP, READ, dispatch, fast_weights, per_row
from .optimisers import NEWTON_SCHULZ, Muon
from .rule import Rule
from .state import init_state

if TYPE_CHECKING:
    from jaxtyping import Float


class Gate(nn.Module):
    """sigmoid(x W + b), one per token and `size`, in float32 or wider. W as torch's Linear."""

    def __init__(self, dim: int, size: int, start: float) -> None:
        super().__init__()
        self.x = nn.Linear(dim, size)
        nn.init.constant_(self.x.bias, start)

    def forward(self, x: Tensor) -> Tensor:
        return wide(self.x(x)).sigmoid()


def silence(gate: str) -> Callable[[Any], None]:
    """Set the momentum or decay of a layer to its neutral value, 0."""

    def neutral(layer: Any) -> None:
        nn.init.constant_(getattr(layer, f"{gate}_gate").x.bias, -torch.inf)

    return neutral


class FastWeightsWrite(NamedTuple):
    """What each token writes, named as the arguments of `fast_weights`; M is 1, or the number of
    matrices."""

    k: Float[Tensor, "B T H K"]
    v: Float[Tensor, "B T H V"]
    lr: Float[Tensor, "B T H M"]
    momentum: Float[Tensor, "B T H"] | None
    decay: Float[Tensor, "B T H"] | None


class FastWeights(Memory, name="fast_weights"):
    """A network M_W trained on the pairs (k, v) while the sequence is read; o_t = M_(W_t)(q_t).

    update: token   S_j = momentum_j S_(j-1) - lr_j g_j,   U_j = (1 - decay_j) U_(j-1) + S_j,
                    W_j = A_j W_0 + row_j U_j
    update: chunk   at the end of the mini-batch S = mean(momentum) S - sum_j lr_j g_j,
                    W = A W_0 + direction(S); its tokens read W_0

    lr_t = lr sigmoid(x_t w + b) / (s sqrt(C)),   momentum_t, decay_t = sigmoid(x_t w + b)

    where

    - W_0 are the weights from the start of j's mini-batch of C tokens;
    - g_j is the gradient of the objective of M(k_j) against v_j at W_0;
    - A is the product of 1 - decay over the mini-batch so far;
    - s is the squared length of a matrix's inputs: 1 for a key with qk_norm l2, otherwise K, and I
      / 2 for I hidden units. If all matrices share a rate, the largest s counts;
    - w and b are learned, for each gate and head.

    The layer learns the initial weights and the gates by backpropagation through all of this
    (second order, exact). `ttt_linear`, `ttt_mlp`, `titans`, `lact`, `allmem`, `yaad`, `moneta`
    and `memora` are points in this space.

    sqrt(C) stands between two cases: the C gradients of a mini-batch add up to C of them where
    tokens agree, and to 1 where tokens are orthogonal. With `row`, which is a mean already, it is
    left out. Matrices start normal with variance 1 / s, the last one with a quarter of it times
    init_scale^2; biases start at 0. q and k enter the network alike, so no qk_norm scales q here.
    """

    class Config(Memory.Config, Rule):
        lr: float = 1.0
        """The learning rate of a token is at most this value."""
        init_scale: float = 1.0
        """The last matrix starts with this scale. In a converted model, where little is trained, a
        small scale lets what is written outweigh the noise that an untrained network reads."""
        lr_per_matrix: bool = False
        """If true, every matrix has a rate of its own."""
        row: bool = False
        """If true, token i of a mini-batch reads its writes times max(0, 1 / i + learned). It
        needs `update: token`."""
        lr_bias: float = 0.0
        """b of the learning rate's gate starts at this value. 0 is half of the highest rate."""
        momentum_bias: float = 0.0
        """b of the momentum's gate starts at this value. 0 is a momentum of 1/2."""
        decay_bias: float = -9.0
        """b of the decay's gate starts at this value. -9 is a decay of 1/8000 a token. (A product
        of two matrices that both fade is gone twice as fast.)"""

        def check(self) -> None:
            Memory.Config.check(self)
            Rule.check(self)
            for name in ("lr", "init_scale"):
                if getattr(self, name) <= 0:
                    raise SpecError(f"{name}: must be positive, got {getattr(self, name)}")
            if self.row and self.update == "chunk":
                raise SpecError(
                    "row: weighs the tokens inside a mini-batch, which update 'chunk' does not"
                )
            check_bounded(self, self.qk_norm, self.lr_per_matrix)

        def inner_rule(self) -> Rule:
            return Rule(**{field.name: getattr(self, field.name) for field in Rule.fields()})

    source = "Sun et al. 2024, arXiv 2407.04620; axes of many, see its options"
    op = OP
    cases: ClassVar[tuple[dict[str, Any], ...]] = ({"heads": 2, "mini_batch": 5},)
    config: Any

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.inner_rule = rule = config.inner_rule()
        H, K, V = self.heads, self.key_dim, self.value_dim
        if rule.network.residual and K != V:
            raise SpecError(f"network: residual needs key_dim = value_dim, got {K} and {V}")
        self.shapes = rule.network.shapes(K, V)
        # The squared length of a matrix's inputs: of a key, or of half of the hidden units.
        key = 1.0 if config.qk_norm == "l2" else float(K)
        first = rule.network.first
        self.squares = [key if m in first else i / 2 for m, (i, _) in enumerate(self.shapes)]
        self.weights = nn.ParameterList(self.start(m) for m in range(len(self.shapes)))
        rates = len(self.shapes) if config.lr_per_matrix else 1
        self.lr_gate = Gate(dim, H * rates, config.lr_bias)
        scale = self.squares if config.lr_per_matrix else [max(self.squares)]
        together = 1.0 if config.row else rule.mini_batch**0.5
        self.rates = Constant(config.lr / together / torch.tensor(scale, dtype=torch.float64))
        if rule.has_momentum:
            self.momentum_gate = Gate(dim, H, config.momentum_bias)
        if rule.has_decay:
            self.decay_gate = Gate(dim, H, config.decay_bias)
        if config.row:
            self.row_offset = nn.Parameter(torch.zeros(rule.mini_batch))
        if rule.network.layer_norm:
            self.norm_weight = nn.Parameter(torch.ones(H, V))
            self.norm_bias = nn.Parameter(torch.zeros(H, V))

    @property
    def mini_batch(self) -> int:
        """The config's, until it is set; rates, which were chosen for the config's, stay."""
        return self.inner_rule.mini_batch

    @mini_batch.setter
    def mini_batch(self, tokens: int) -> None:
        if self.config.row and tokens != self.config.mini_batch:
            raise SpecError(f"{self.name}: mini_batch: `row` is learned for {self.mini_batch}")
        self.inner_rule = dataclasses.replace(self.inner_rule, mini_batch=tokens)

    def start(self, m: int) -> Tensor:
        """Initial weights of a matrix: outputs of variance 1, behind the last one a quarter and
        times init_scale^2."""
        network, (i, o) = self.inner_rule.network, self.shapes[m]
        std = self.squares[m] ** -0.5
        if m == network.last and m not in network.first:
            std = std / 2
        if m == network.last:
            std = std * self.config.init_scale
        weights = torch.randn(self.heads, i + network.bias, o) * std
        if network.bias:
            weights[:, -1] = 0
        return weights

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> FastWeightsWrite:
        rule = self.inner_rule
        lr = self.lr_gate(x).unflatten(-1, (self.heads, -1)) * self.rates()
        momentum = self.momentum_gate(x) if rule.has_momentum else None
        decay = self.decay_gate(x) if rule.has_decay else None
        return FastWeightsWrite(k, v, lr, momentum, decay)

    def constants(self) -> dict[str, Any]:
        """The arguments of the op that no token writes."""
        row = norm = None
        if self.config.row:
            offset = wide(self.row_offset)
            place = torch.arange(1, len(offset) + 1).to(offset)
            row = (1 / place + offset).clamp(min=0)
        if self.inner_rule.network.layer_norm:
            norm = (self.norm_weight, self.norm_bias)
        return {"spec": self.inner_rule, "row": row, "layer_norm": norm}

    def rule(self, q: Tensor, write: FastWeightsWrite, state: State) -> tuple[Tensor, State]:
        return dispatch(
            self.impl,
            q,
            *write,
            tuple(self.weights),
            **self.constants(),
            state=state,
            checkpoint=self.checkpoint,
            compiled=self.compiled,
        )

    def read(self, q: Tensor, state: State) -> Tensor:
        constants = self.constants()
        initial, norm = per_row(tuple(self.weights), constants["layer_norm"], len(q))
        rule, row = constants["spec"], constants["row"]
        return READ("chunked", q, row, norm, initial, rule=rule, state=state)

    def cautions(self, T: int) -> list[str]:
        C = self.inner_rule.mini_batch
        what = (
            "nothing is ever written"
            if self.inner_rule.update == "chunk"
            else "W_0 is never updated"
        )
        if T >= C:
            return []
        return [
            f"{self.name}: a mini-batch of {C} never fills in sequences of {T} tokens, so {what}; "
            f"set mini_batch to {max(1, T // 4)} or less"
        ]

    def diagnose(self, x: Tensor) -> dict[str, float]:
        """Means over the mini-batches that x `[B, T, D]` fills: see diagnostics.py."""
        log = Log()
        with torch.no_grad():
            q, write = self.project(x)
            given = {**present(write), **self.constants()}
            fast_weights(q, weights=tuple(self.weights), **given, impl="chunked", watch=log)
        return log.means()

    def rule_state(self, batch_size: int) -> State:
        return init_state(self.inner_rule, tuple(map(wide, self.weights)), batch_size)

    def rule_bytes(self, T: int) -> StateBytes:
        state = init_state(self.inner_rule, tuple(w.detach() for w in self.weights), 1)
        memory = sum(4 * w.numel() for w in state.pop("weights"))
        position = 8 if state.pop("position", None) is not None else 0
        flat = [x for part in state.values() for x in (part if type(part) is tuple else (part,))]
        return StateBytes(memory, position + sum(4 * x.numel() for x in flat))

    def rule_flops(self, T: int) -> float:
        """A token's forward pass, errors and outer products, its read, and Muon's share."""
        sizes, first = [i * o for i, o in self.shapes], self.inner_rule.network.first
        behind = sum(size for m, size in enumerate(sizes) if m not in first)
        flops = 6.0 * sum(sizes) + 2 * behind
        if isinstance(self.inner_rule.optimiser, Muon):
            share = len(NEWTON_SCHULZ) * (T // self.inner_rule.mini_batch) / T
            for i, o in self.shapes:
                r, c = min(i, o), max(i, o)
                flops += share * (4 * r * r * c + 2 * r**3)
        return self.heads * flops
