"""Layer, the registry that its class statement fills, discovery, and build()."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo.checked import Match
from layerzoo.forms import Form, form_of, tensor
from layerzoo.ops import IMPLS, Op
from layerzoo.spec import Config, Spec, SpecError, error_at, suggest

if TYPE_CHECKING:
    from jaxtyping import Float

State = Any
"""A pytree (tensors in dicts, tuples and lists), batch first but for a 0-d position."""

_REGISTRY: dict[str, type[Layer]] = {}
_discovered = False

DISCOVER = ("layerzoo.model.compose", "layerzoo.memories", "layerzoo.attention")
ENTRY_POINTS = "layerzoo.layers"


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
        if name in _REGISTRY:
            other = _REGISTRY[name]
            raise TypeError(
                f"layer '{name}' is already registered by {other.__module__}.{other.__qualname__}"
            )
        cls.name = name
        _REGISTRY[name] = cls

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


def discover() -> None:
    """Import every module that may hold a layer: of this package, and of the entry points."""
    global _discovered
    if _discovered:
        return
    for package in DISCOVER:
        module = importlib.import_module(package)
        for info in pkgutil.walk_packages(module.__path__, package + "."):
            importlib.import_module(info.name)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except (ImportError, AttributeError, TypeError) as error:
            owner = point.dist.name if point.dist else "an installed package"
            raise SpecError(
                f"entry point '{point.name} = {point.value}' of {owner} does not load: {error}; "
                f"mend or uninstall it"
            ) from error
    _discovered = True  # only now: a failed discovery must fail again, not list half a zoo


def list_layers(kind: str | None = None) -> list[str]:
    """The registered names, sorted; `kind` is memory, attention or composition."""
    discover()
    return sorted(name for name, cls in _REGISTRY.items() if kind in (None, cls.kind))


def get_layer(name: str) -> type[Layer]:
    """The class registered as `name`.

    Raises:
        SpecError: no such layer.
    """
    discover()
    if not isinstance(name, str) or name not in _REGISTRY:
        raise SpecError(f"unknown layer '{name}'; {suggest(name, _REGISTRY)}")
    return _REGISTRY[name]


def check_spec(spec: Spec | Layer, **fields: Any) -> tuple[type[Layer], Config]:
    """The class and config that a spec names, checked without building anything (or its dim)."""
    if isinstance(spec, Layer):
        return type(spec), spec.config
    if not isinstance(spec, (str, Mapping)):
        raise SpecError(f"a layer spec is a name or a mapping, got {spec!r}")
    merged = {"name": spec, **fields} if isinstance(spec, str) else {**spec, **fields}
    if "name" not in merged:
        raise SpecError(f"a layer spec needs a name, got {merged!r}")
    merged.pop("dim", None)
    cls = get_layer(merged.pop("name"))
    with error_at(cls.name):
        return cls, cls.Config.from_fields(merged)


def full_spec(spec: Spec | Layer) -> dict[str, Any]:
    """The spec with all fields of its config, and those of its children, in plain types: the same
    layer whatever becomes of a default."""
    cls, config = check_spec(spec)
    return {"name": cls.name, **config.to_fields()}


def build(spec: Spec | Layer, *, dim: int | None = None, **fields: Any) -> Layer:
    """Build a layer from its registered name or spec: ``build("linear", dim=256, heads=4)``,
    ``build({"name": "linear", "heads": 4}, dim=256)``. A layer that is already built is returned.

    Args:
        spec: name, or mapping of name and config fields (keywords win over the mapping's).
        dim: the model width D; a mapping may hold it too.
        fields: config fields of the layer.

    Raises:
        SpecError: unknown name or field, wrong type or value, or a dim that does not fit.
    """
    if isinstance(spec, Layer):
        if dim not in (None, spec.dim) or fields:
            raise SpecError(f"{spec.name}: already built with dim={spec.dim}; it takes no fields")
        return spec
    if isinstance(spec, Mapping) and "dim" in spec:
        spec = dict(spec)
        inner = spec.pop("dim")
        if dim not in (None, inner):
            raise SpecError(f"dim: {inner} in the spec contradicts {dim}")
        dim = inner
    cls, config = check_spec(spec, **fields)
    with error_at(cls.name):
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise SpecError(f"dim: expected a positive int, got {dim!r}")
        return cls(dim, config)
