"""The fast weights: every axis crossed with every other, what is refused, and the parts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves

from layerzoo.memories.fast_weights import Rule, engine, fast_weights
from layerzoo.memories.fast_weights import rule as engine_rule
from layerzoo.memories.fast_weights.activations import GELU, GELU_TANH, SILU
from layerzoo.memories.fast_weights.objectives import Objective
from layerzoo.memories.fast_weights.primitives import AddGradients, Dual, products
from layerzoo.registry import build
from layerzoo.spec import SpecError

ALL: Any = {"bias": True, "residual": True, "layer_norm": True}
NETWORKS: Any = (
    "linear",
    {"name": "linear", **ALL},
    {"name": "mlp", "expansion": 1.5},
    {"name": "mlp", "activation": "gelu_tanh", **ALL},
    {"name": "mlp", "depth": 3, "expansion": 1.5, "layer_norm": True},
    {"name": "mlp", "depth": 4, "expansion": 1.5, "residual": True},
    "glu",
    {"name": "glu", **ALL},
)
OBJECTIVES: Any = ("dot", "l2", {"name": "huber", "delta": 0.5}, "lp", {"name": "lp", "p": 2.5})
OPTIMISERS: Any = ("sgd", "momentum", "muon", {"name": "muon", "momentum": True})
FORGETTINGS: Any = (
    "none",
    "decay",
    "norm",
    {"name": "norm", "decay": True, "eps": 1e-5},
    "lq",
    {"name": "lq", "decay": True},
    "kl",
    {"name": "kl", "decay": True},
)
PLACES = ("end", "start", "view")
UPDATES = ("token", "chunk")
MINI_BATCHES = (1, 5, 7)
AXES = (NETWORKS, OBJECTIVES, OPTIMISERS, FORGETTINGS, PLACES, UPDATES, MINI_BATCHES)
NAMES = ("network", "objective", "optimiser", "forgetting", "place", "update", "mini_batch")
STRIDE = 41  # coprime to the length of every axis, or some options would never meet
T, B, H, K = 17, 2, 2, 4


def sample() -> list[Rule]:
    """The defined ones among every STRIDE-th combination."""
    rules = []
    for values in itertools.islice(itertools.product(*AXES), 0, None, STRIDE):
        try:
            rules.append(Rule(**dict(zip(NAMES, values, strict=True))))
        except SpecError:
            continue
    return rules


RULES = sample()


class Problem:
    """A rule with inputs: all that takes a gradient is in `leaves`."""

    def __init__(self, rule: Rule, seed: int, tokens: int = T) -> None:
        g = torch.Generator().manual_seed(seed)
        self.rule = rule

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g, dtype=torch.float64)

        V = K if rule.network.residual else K + 1
        shapes = rule.network.shapes(K, V)
        self.weights = tuple(normal(H, i + rule.network.bias, o).div(i**0.5) for i, o in shapes)
        rates = (len(shapes),) if seed % 2 else ()
        at = (B, tokens, H)
        self.tokens = {name: normal(*at, n) for name, n in (("q", K), ("k", K), ("v", V))}
        self.tokens["k"] /= self.tokens["k"].norm(dim=-1, keepdim=True)
        self.tokens["lr"] = 0.1 * uniform(*at, *rates)
        if rule.has_momentum:
            self.tokens["momentum"] = uniform(*at)
        if rule.has_decay:
            self.tokens["decay"] = 0.3 * uniform(*at)
        self.whole: dict[str, Any] = {}
        if rule.update == "token" and seed % 3 == 0:
            self.whole["row"] = 1 / (1 + uniform(rule.mini_batch))
        if rule.network.layer_norm:
            self.whole["layer_norm"] = (1 + 0.1 * normal(H, V), 0.1 * normal(H, V))
        self.leaves = [*self.tokens.values(), *self.weights, *tree_leaves(self.whole)]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.cut = int(torch.randint(1, tokens, (), generator=g))

    def run(self, impl: str, *cuts: int, **options: Any) -> tuple[Tensor, Any]:
        """Output and final state of the sequence, cut at these tokens."""
        length = self.tokens["q"].shape[1]
        bounds, state, outputs = (0, *cuts, length), None, []
        for a, b in itertools.pairwise(bounds):
            piece: Any = {name: x[:, a:b] for name, x in self.tokens.items()}
            given: Any = {"weights": self.weights, "spec": self.rule, **self.whole, **options}
            o, state = fast_weights(**piece, **given, state=state, impl=impl)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    def grads(self, o: Tensor, state: Any) -> list[Tensor]:
        found = [o, *(x for x in tree_leaves(state) if x.is_floating_point())]
        loss = sum((x * torch.linspace(-1, 2, x.numel()).to(x).view_as(x)).sum() for x in found)
        assert isinstance(loss, Tensor)
        return list(torch.autograd.grad(loss, self.leaves, materialize_grads=True))


def assert_same(got: Any, want: Any, tol: float = 1e-8) -> None:
    """Relative to the largest entry: deep networks amplify rounding."""
    xs, ys = tree_leaves(got), tree_leaves(want)
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.shape == y.shape and torch.isfinite(y).all()
        torch.testing.assert_close(
            x, y, rtol=0, atol=tol * max(float(y.detach().abs().max()), 1e-3)
        )


def label(rule: Rule) -> str:
    parts = (rule.network, rule.objective, rule.optimiser, rule.forgetting)
    names = [part.name for part in parts]
    return "-".join((*names, rule.place, rule.update, str(rule.mini_batch)))


def test_sample_covers_every_axis() -> None:
    assert all(math.gcd(STRIDE, len(axis)) == 1 for axis in AXES)
    assert len(RULES) >= 100
    for name, axis in zip(NAMES, AXES, strict=True):
        for value in axis:
            want = engine_rule.AXES[name].of(value) if name in engine_rule.AXES else value
            quick = [rule for n, rule in enumerate(RULES) if n % 3 < 2]
            assert any(getattr(rule, name) == want for rule in quick), f"{name} {value} is missing"


@pytest.mark.parametrize(
    "n",
    [
        pytest.param(n, id=label(rule), marks=[pytest.mark.slow] if n % 3 == 2 else [])
        for n, rule in enumerate(RULES)
    ],
)
def test_crossed(n: int) -> None:
    """chunked, cut anywhere, is recurrent: outputs, final state, every gradient; and causal."""
    # A step of Muon is of the size of the weights: one a token amplifies rounding without end.
    steps = RULES[n].optimiser.name == "muon" and RULES[n].mini_batch == 1
    problem = Problem(RULES[n], n, tokens=9 if steps else T)
    want = problem.run("recurrent")
    wanted = problem.grads(*want)
    got = problem.run("chunked", problem.cut)
    assert_same(got, want)
    grads = problem.grads(*got)
    if (
        RULES[n].optimiser.name == "muon"
    ):  # small gradients are sums of large ones: of all together
        wanted, grads = (torch.cat([x.flatten() for x in xs]) for xs in (wanted, grads))
    assert_same(grads, wanted)
    with torch.no_grad():
        for impl in ("recurrent", "chunked"):
            assert_same(problem.run(impl, 2, 3, 8), want)
        t, (before, _) = problem.cut, problem.run("chunked")
        for x in problem.tokens.values():
            x[:, t:] = 0.5
        after, _ = problem.run("chunked")
        assert_same(after[:, :t], before[:, :t], 1e-12)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("C", [2, 64, 150])
def test_many_pieces(update: Any, C: int) -> None:
    """Groups of many mini-batches, and a mini-batch of more than one piece."""
    rule = Rule(optimiser="momentum", forgetting="decay", update=update, mini_batch=C)
    T = max(101, 2 * C + 31)
    problem = Problem(rule, 3 if update == "token" else 1, tokens=T)
    assert C < 150 or engine.MAX_PIECE < C
    want = problem.run("recurrent")
    got = problem.run("chunked", 2 * T // 5)
    assert_same(got, want)
    assert_same(problem.grads(*got), problem.grads(*want))


def test_checkpoint_changes_nothing() -> None:
    problem = Problem(Rule(network={"name": "mlp", **ALL}, forgetting="decay", mini_batch=5), 3)
    want, got = problem.run("chunked", 8), problem.run("chunked", 8, checkpoint=True)
    assert_same(got, want, 0.0)
    assert_same(problem.grads(*got), problem.grads(*want), 1e-12)


REFUSED: Any = [
    ({"optimiser": "muon"}, "muon.*update 'chunk'"),
    ({"optimiser": "muon", "update": "chunk", "network": {"name": "mlp", "bias": True}}, "bias"),
    ({"forgetting": "norm", "network": {"name": "glu", "bias": True}}, "norm.*bias"),
    ({"forgetting": "norm", "place": "start"}, "place 'start' needs update 'chunk'"),
    ({"forgetting": "norm", "place": "view"}, "place 'view' needs update 'chunk'"),
    ({"forgetting": "kl", "update": "chunk"}, "kl.*place 'view'.*master copy"),
    ({"forgetting": "lq", "update": "chunk", "place": "start"}, "lq.*place 'view'"),
    ({"place": "view", "update": "chunk"}, "place 'view' does nothing with forgetting 'none'"),
    ({"place": "start", "forgetting": "decay"}, "does nothing with forgetting 'decay'"),
    ({"objective": {"name": "lp", "p": 1.5}}, "objective: lp: p: must be at least 2"),
    ({"objective": "hubber"}, "objective: unknown option 'hubber'; did you mean 'huber'"),
    ({"network": {"name": "mlp", "width": 3}}, "network: mlp: unknown field 'width'"),
    ({"network": {"name": "mlp", "depth": 5}}, "depth: must be 2, 3 or 4"),
    ({"network": 3}, "network: expected a name or a mapping"),
    ({"mini_batch": 0}, "mini_batch: must be at least 1"),
]


@pytest.mark.parametrize("fields, message", REFUSED)
def test_refused_by_name(fields: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Rule(**fields)
    with pytest.raises(SpecError, match=f"^fast_weights: .*{message}"):
        build("fast_weights", dim=16, **fields)


UNBOUNDED: Any = [
    ({"objective": "lp", "network": "linear"}, "objective 'lp' needs"),
    ({"objective": {"name": "lp", "p": 2.5}}, "objective 'lp' needs"),
    ({"objective": "dot"}, "objective 'dot' of network 'mlp' needs"),
    ({"objective": "dot", "network": "glu", "forgetting": "decay"}, "objective 'dot' of"),
    ({"qk_norm": "none", "network": "linear"}, "qk_norm: 'none' needs"),
    ({"qk_norm": "none", "objective": "huber"}, "qk_norm: 'none' needs"),
    ({"qk_norm": "rms", "network": "glu"}, "qk_norm: 'rms' of network 'glu' needs"),
    ({"lr_per_matrix": True, "network": "glu"}, "lr_per_matrix: of network 'glu' needs"),
]
BOUNDS: Any = [
    {"forgetting": "norm"},
    {"forgetting": "kl", "place": "view", "update": "chunk"},
    {"optimiser": "muon", "update": "chunk"},
]


@pytest.mark.parametrize("fields, message", UNBOUNDED)
def test_layer_refuses_what_grows_without_bound(fields: Any, message: str) -> None:
    """And takes it with a bound on the weights, the step or the error."""
    with pytest.raises(SpecError, match=f"^fast_weights: {message}.* a network with layer_norm, "):
        build("fast_weights", dim=16, **fields)
    for bound in BOUNDS:
        build("fast_weights", dim=16, **{**fields, **bound})
    network = {"name": fields.get("network", "mlp"), "layer_norm": True}
    build("fast_weights", dim=16, **{**fields, "network": network})


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": {"name": "lp", "p": 2.0}},
        {"objective": "dot", "network": "linear", "qk_norm": "none"},
        {"objective": "huber", "network": "linear", "qk_norm": "none"},
        {"objective": "huber", "network": "glu", "qk_norm": "rms", "lr_per_matrix": True},
        {"network": "glu"},
    ],
)
def test_layer_takes_what_a_rate_makes_stable(fields: Any) -> None:
    build("fast_weights", dim=16, **fields)


def test_layer_refuses() -> None:
    with pytest.raises(SpecError, match=r"row: .*update 'chunk'"):
        build("lact", dim=16, row=True)
    with pytest.raises(SpecError, match="residual needs key_dim = value_dim, got 4 and 5"):
        build("allmem", dim=16, key_dim=4, value_dim=5)
    with pytest.raises(SpecError, match="lr: must be positive"):
        build("titans", dim=16, lr=0.0)
    with pytest.raises(SpecError, match="init_scale: must be positive, got -1"):
        build("allmem", dim=16, init_scale=-1)


@pytest.mark.parametrize("network", ["linear", "mlp", "glu"])
def test_init_scale_is_of_the_last_matrix_alone(network: str) -> None:
    layers = []
    for fields in ({}, {"init_scale": 0.1}):
        torch.manual_seed(0)
        layers.append(build("fast_weights", dim=16, network=network, **fields))
    plain, small = ([*layer.weights] for layer in layers)
    last = layers[0].inner_rule.network.last
    for m, (a, b) in enumerate(zip(plain, small, strict=True)):
        torch.testing.assert_close(b, a * 0.1 if m == last else a, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"momentum": torch.rand(B, T, H)}, "momentum: optimiser 'sgd' of this rule has no"),
        ({"decay": None}, "decay: forgetting 'decay' of this rule needs decay"),
        ({"decay": torch.rand(B, T)}, rf"decay: shape \(2, {T}\) is not"),
        ({"lr": torch.rand(B, T, H, 3)}, "lr: shape .* is neither"),
        ({"row": torch.rand(3)}, r"row: shape \(3,\) is not \[5\]"),
        ({"weights": (torch.rand(H, K, 3),)}, "weights: shapes .* of network 'mlp'"),
        ({"layer_norm": (torch.rand(H, 5),) * 2}, "layer_norm: network 'mlp' .* has no"),
    ],
)
def test_op_refuses(change: Any, message: str) -> None:
    rule = Rule(forgetting="decay", mini_batch=5, network={"name": "mlp", "expansion": 1})
    problem = Problem(rule, 2)
    given: Any = {**problem.tokens, "weights": problem.weights, "spec": rule, **change}
    with pytest.raises(SpecError, match=message):
        fast_weights(**given)


def second(x: Tensor, leaf: Tensor) -> Tensor:
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(x.sum(), leaf, **options)[0]


@pytest.mark.parametrize("value", OBJECTIVES, ids=str)
def test_error_is_the_gradient_of_the_loss(value: Any) -> None:
    objective = Objective.of(value)
    y, v = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    want = Objective.error(objective, y, v)  # by autograd
    got = objective.error(y, v)
    assert_same(got, want, 1e-12)
    w = torch.randn_like(y)
    for leaf in (y, v):
        pair = [second(e * w, leaf) for e in (got, want)]
        assert_same(pair[0], pair[1], 1e-12)
    assert torch.isfinite(second(objective.error(y, 1 * y), y)).all()  # at zero error


@pytest.mark.parametrize("activation", [GELU, GELU_TANH, SILU])
def test_activations(activation: Any) -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation.f(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    g = torch.randn_like(x, requires_grad=True)
    torch.testing.assert_close(activation.times_derivative(g, x), g * slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(activation.curvature(x.detach()), curvature, rtol=0, atol=1e-12)
    assert gradcheck(activation.times_derivative, (g, x))


def test_products() -> None:
    x = torch.rand(2, 6, dtype=torch.float64)
    x[0, 2], x[1, 0], x[1, 3] = 0, 0, 1
    L = products(x)
    for i, j in itertools.product(range(6), range(6)):
        want = x[:, j + 1 : i + 1].prod(-1) if j <= i else torch.zeros(2)
        torch.testing.assert_close(L[:, i, j], want.double(), rtol=0, atol=1e-15)
    assert gradcheck(products, x.clamp(1e-3, 0.999).requires_grad_())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("coefficients", [False, True])
@pytest.mark.parametrize("rows, columns", [(2, 3), (3, 2)])
def test_primitives(
    full: bool, momentum: bool, coefficients: bool, rows: int, columns: int
) -> None:
    N, n, I, O = 2, 3, rows, columns  # noqa: E741

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    z, X, E, w, t, theta = (new(N, n, d) for d in (I, I, O, 1, 1, 1))
    L, matrices = new(N, n, n), [new(N, I, O) for _ in range(3)]
    parts: list[Any] = []
    for m, W in enumerate(matrices):
        if m == 2 and not momentum:
            parts += [None, None, None]
        elif m == 2 or coefficients:
            parts += [W, new(N, n, 1), new(N, 1, 1)]
        else:
            parts += [W, None, None]
    last = (t, theta[:, :1].detach().requires_grad_()) if momentum else (None, None)
    given = [z, X, E, L, w, *last, *parts]

    def run(*tensors: Tensor) -> Any:
        it = iter(tensors)
        out = Dual.apply(full, *(None if x is None else next(it) for x in given))
        return tuple(x for x in out if x is not None)

    assert gradcheck(run, tuple(x for x in given if x is not None))
    assert gradcheck(AddGradients.apply, (X, E, w, matrices[0]))
    assert gradcheck(AddGradients.apply, (X, E, w, None))
