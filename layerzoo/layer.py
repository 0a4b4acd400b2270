"""Layer, and the registry that its class statement fills."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo.annotations import Form, form_of, tensor
from layerzoo.ops import IMPLS, Op
from layerzoo.signature import Match
from layerzoo.spec import Config, SpecError, suggest

if TYPE_CHECKING:
    from jaxtyping import Float

State = Any
"""A pytree (tensors in dicts, tuples and lists), batch first but for a 0-d position."""

REGISTERED: dict[str, type[Layer]] = {}


class StateBytes(NamedTuple):
    """Size of a state: the memory proper, and its buffers (anchor, momentum, ring, position)."""

    memory: int
    buffers: int = 0

    @property
    def total(self) -> int:
        return self.memory + self.buffers


class Reach(NamedTuple):
    """How far information travels through a layer: `back` positions, and from the first `sinks`
    positions always."""

    back: int
    sinks: int = 0


class Reduction(NamedTuple):
    """A claim that the conformance suite tests: a layer built from `spec`, with its gates set to
    their neutral value by `neutral(layer)`, is the layer built from `parent`."""

    spec: dict[str, Any]
    parent: dict[str, Any]
    neutral: Callable[[Any], None] = lambda layer: None


class Inner(NamedTuple):
    """The rule of a layer without its projections: `fn(tensors, state) -> o, state`, with named
    tensors `[B, T, ...]` that may be cut along T, and a state as the layer's own."""

    fn: Callable[[dict[str, Tensor], State], tuple[Tensor, State]]
    tensors: dict[str, Tensor]


EXECUTION = {"impl": IMPLS, "checkpoint": (False, True), "compiled": (False, True)}
"""Attributes of a layer that never change the function, only how it is computed, and the values
that they may have. They are not part of a run's identity."""


class Layer(nn.Module):
    """A causal sequence mixer, `[B, T, D] -> [B, T, D]`.

    The law: running a sequence in any pieces, down to single tokens, equals running it whole,
    outputs and final state; `forward` never changes the state it is given. An x that is not
    `[B, T, dim]`, or a state of another layer or batch size, is a `SpecError`, whatever the impl
    (while torch.compile traces nothing is checked).

    A subclass registers itself: ``class Mine(Layer, name="mine")``. It holds a nested `Config`,
    a `source` (paper), and `cases`: small specs with which the conformance suite proves the law.
    What does not change the function is an attribute, never a config field. Setting it sets it for
    the layers inside, too.

    Attributes:
        impl: The layer runs this implementation of its op: auto, recurrent, chunked or triton.
        checkpoint: If true, a layer that knows how keeps less for the backward pass, and computes
            it again.
        compiled: If true, a layer that knows how compiles what torch.compile of the whole would
            leave out. It needs a C++ compiler on a CPU.
    """

    Config: ClassVar[Any]  # a subclass of layerzoo.spec.Config
    config: Any
    name: ClassVar[str]
    kind: ClassVar[str] = "layer"
    source: ClassVar[str] = ""
    cases: ClassVar[tuple[dict[str, Any], ...]] = ()
    reductions: ClassVar[tuple[Reduction, ...]] = ()
    op: ClassVar[Op | None] = None

    impl: str = "auto"
    checkpoint: bool = False
    compiled: bool = False

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:  # an abstract base
            return
        if not issubclass(getattr(cls, "Config", type(None)), Config):
            raise TypeError(f"layer '{name}' ({cls.__qualname__}) has no nested Config class")
        if not cls.cases or not cls.source:
            raise TypeError(f"layer '{name}' ({cls.__qualname__}) must declare cases and source")
        if name in REGISTERED:
            other = REGISTERED[name]
            raise TypeError(
                f"layer '{name}' is already registered by {other.__module__}.{other.__qualname__}"
            )
        cls.name = name
        REGISTERED[name] = cls

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        self.dim = dim
        self.config = config

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in EXECUTION:
            return super().__setattr__(name, value)
        if value not in EXECUTION[name]:
            known = suggest(str(value), map(str, EXECUTION[name]))
            raise SpecError(f"{name} '{value}' is unknown; {known}")
        for module in self.modules():  # of the layers in it, too
            if isinstance(module, Layer):
                vars(module)[name] = value

    def __call__(self, x: Tensor, state: State = None, **more: Any) -> tuple[Tensor, State]:
        if not is_compiling():
            self.check(x, state)
        return super().__call__(x, state, **more)

    def forward(
        self, x: Float[Tensor, "B T D"], state: State = None
    ) -> tuple[Float[Tensor, "B T D"], State]:
        raise NotImplementedError

    def check(self, x: Tensor, state: State) -> None:
        """Refuse what `forward` cannot read.

        Raises:
            SpecError: x is not `[B, T, D]`, or the state is another layer's or of another batch.
        """
        found = Match(self.name)
        found.fit(input_form(self.dim), x, "x")
        if state is not None:
            check_state(self, found, state, lambda: self.init_state(0))

    def inner(self, x: Tensor, state: State = None) -> Inner | None:
        """What the layer runs between its projections, and its input for x `[B, T, D]`, as the
        benchmarks time it; None for a layer that is not made so (a composition)."""
        return None

    def init_state(self, batch_size: int) -> State:
        """The state before the first token, on the parameters' device."""
        raise NotImplementedError

    def state_bytes(self, T: int) -> StateBytes:
        """Bytes of the state after T tokens, for batch size 1 in float32."""
        raise NotImplementedError

    def rule_flops(self, T: int) -> float:
        """Matrix-product FLOPs per token of the rule alone, without projections (mean over T)."""
        raise NotImplementedError

    def flops_per_token(self, T: int) -> float:
        """Matrix-product FLOPs (2 a multiply-add) per token, forward, mean over T tokens."""
        linear = (m for m in self.modules() if isinstance(m, nn.Linear))
        return sum(2 * m.in_features * m.out_features for m in linear) + self.rule_flops(T)

    def reach(self) -> Reach | None:
        """How far information travels through this layer; None is unbounded."""
        return None

    def cautions(self, T: int) -> list[str]:
        """What this layer cannot do in sequences of T tokens, a line each."""
        return []

    def diagnose(self, x: Float[Tensor, "B T D"]) -> dict[str, float]:
        """Figures on how the layer works on its input x, by name; none by default."""
        return {}

    def ops(self) -> tuple[Op, ...]:
        """The ops that this layer and its children run."""
        found = {m.op.name: m.op for m in self.modules() if isinstance(m, Layer) and m.op}
        return tuple(found.values())

    def spec(self) -> dict[str, Any]:
        """The spec that builds this layer again."""
        return {"name": self.name, **self.config.to_fields()}

    def extra_repr(self) -> str:
        return f"{self.name}, dim={self.dim}"


@functools.cache
def input_form(dim: int) -> Form:
    return tensor(f"B T {dim}")


def check_state(owner: nn.Module, found: Match, state: State, start: Callable[[], State]) -> None:
    """Refuse a state that is not like the one that `start` makes of no rows, but of B rows.

    The owner keeps the form. A layer may be set to something else after that, and so a state that
    does not fit is compared with the form of now.
    """
    known = vars(owner).get("_state_form")
    if known is not None:
        try:
            found.fit(known, state, "state")
        except SpecError:
            pass
        else:
            return
    with torch.no_grad():
        vars(owner)["_state_form"] = form = form_of(start())
    found.fit(form, state, "state")
