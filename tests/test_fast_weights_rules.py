"""What fast weights compute where the answer is known: other rules, gates at their ends, reads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from layerzoo.memories.delta import delta_rule
from layerzoo.memories.fast_weights import Rule, engine, fast_weights
from layerzoo.memories.fast_weights.op import read_fast_weights
from layerzoo.memories.fast_weights.primitives import products
from layerzoo.memories.linear import linear_attention
from layerzoo.spec import SpecError

IMPLS = ("recurrent", "chunked")
IMPL = pytest.mark.parametrize("impl", IMPLS)
SIZES = pytest.mark.parametrize("C", [1, 5, 32])  # the last one never fills
B, T, H, K, V = 2, 23, 3, 4, 5
ALL: Any = {"bias": True, "residual": True, "layer_norm": True}
Args = dict[str, Any]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def arguments(rule: Rule, B: int = B, T: int = T, H: int = H) -> Args:
    """Random leaves: unit keys and small rates, so that no objective diverges."""
    O = K if rule.network.residual else V  # noqa: E741
    shapes = rule.network.shapes(K, O)
    x: Args = {
        "q": F.normalize(randn(B, T, H, K), dim=-1),
        "k": F.normalize(randn(B, T, H, K), dim=-1),
        "v": 0.5 * randn(B, T, H, O),
        "lr": 0.2 * rand(B, T, H),
        "weights": tuple(randn(H, i + rule.network.bias, o) / i**0.5 for i, o in shapes),
    }
    if rule.has_momentum:
        x["momentum"] = rand(B, T, H)
    if rule.has_decay:
        x["decay"] = 0.3 * rand(B, T, H)
    if rule.network.layer_norm:
        x["layer_norm"] = (1 + 0.1 * randn(H, O), 0.1 * randn(H, O))
    for leaf in tree_leaves(x):
        leaf.requires_grad_()
    return {**x, "spec": rule}


def leaves(x: Args) -> list[Tensor]:
    return [t for t in tree_leaves({**x, "spec": None}) if t is not None]


def part(x: Args, start: int, end: int) -> Args:
    tokens = ("q", "k", "v", "lr", "momentum", "decay")
    return {name: t[:, start:end] if name in tokens else t for name, t in x.items()}


def floats(found: Any) -> list[Tensor]:
    return [t for t in tree_leaves(found) if t.is_floating_point()]


def grads(found: Any, at: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every entry of outputs and states has another weight."""
    total = sum((t * torch.linspace(-1, 2, t.numel()).to(t).view_as(t)).sum() for t in found)
    return list(torch.autograd.grad(total, at, materialize_grads=True))  # pyright: ignore[reportArgumentType]


def close(got: Any, want: Any, tol: float = 1e-11) -> None:
    """Finite, and equal to `tol` of the largest entry (or of 1, where all are smaller)."""
    for x, y in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert x.shape == y.shape and torch.isfinite(y).all()
        atol = tol * max(1.0, float(y.detach().abs().max()))
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@IMPL
@pytest.mark.parametrize("residual", [False, True])
def test_a_linear_network_is_the_delta_rule(impl: str, residual: bool) -> None:
    """At C = 1 on l2, with beta = lr; of x + x W (TTT-Linear, bare) the state is W + I."""
    x = arguments(Rule(network={"name": "linear", "residual": residual}, mini_batch=1))
    (W,), q, k, v, lr = x["weights"], x["q"], x["k"], x["v"], x["lr"]
    shift = torch.eye(K, W.shape[-1]).double() if residual else torch.zeros(()).double()
    want = delta_rule(q, k, v, lr, state=(W + shift).expand(B, *W.shape))
    o, state = fast_weights(**x, impl=impl)
    assert state.keys() == {"weights"}
    got = (o, state["weights"][0] + shift)
    close(got, want)
    close(grads(got, leaves(x)), grads(want, leaves(x)))


@IMPL
@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
def test_titans_of_depth_one_is_gated_delta(impl: str, optimiser: str) -> None:
    """At C = 1 and momentum 0 the gradient is that of W before its decay, hence of gated delta's
    S / retention: lr = retention beta, and v in units of the decayed state."""
    x = arguments(Rule(network="linear", optimiser=optimiser, forgetting="decay", mini_batch=1))
    (W,), beta, v = x["weights"], x["lr"], x["v"]
    if optimiser == "momentum":
        x["momentum"] = torch.zeros(B, T, H).double()
    keep = 1 - x["decay"]
    start = W.expand(B, *W.shape)
    want, S = delta_rule(x["q"], x["k"], v, beta, keep.log(), state=start)
    o, state = fast_weights(**{**x, "lr": keep * beta, "v": v / keep.unsqueeze(-1)}, impl=impl)
    close((o, state["weights"][0]), (want, S))
    at = [x[name] for name in ("q", "k", "v", "lr", "decay")] + [W]
    close(grads((o, state["weights"][0]), at), grads((want, S), at))
    if optimiser == "momentum":  # S is the last step, without the decay
        _, before = fast_weights(
            **part({**x, "lr": keep * beta, "v": v / keep.unsqueeze(-1)}, 0, T - 1), impl=impl
        )
        step = state["weights"][0] - keep[:, -1, :, None, None] * before["weights"][0]
        close(state["momentum"][0], step)


@IMPL
@SIZES
@pytest.mark.parametrize("decay", [False, True])
def test_dot_of_a_linear_network_is_linear_attention(impl: str, C: int, decay: bool) -> None:
    """Of v lr, in any mini-batch, for its gradient does not depend on W; exactly so with decay."""
    rule = Rule(
        network="linear", objective="dot", forgetting="decay" if decay else "none", mini_batch=C
    )
    x = arguments(rule)
    (W,), v = x["weights"], x["lr"].unsqueeze(-1) * x["v"]
    g = (1 - x["decay"]).log() if decay else None
    want = linear_attention(x["q"], x["k"], v, g, state=W.expand(B, *W.shape))
    o, state = fast_weights(**x, impl=impl)
    last = state["weights"][0]
    if C > 1:
        A = state["retention"][..., None, None] if decay else 1
        last = A * last + state["updates"][0]
    close((o, last), want)
    close(grads((o, last), leaves(x)), grads(want, leaves(x)))


NETWORKS: Any = ("linear", {"name": "mlp", **ALL}, "glu")
OBJECTIVES: Any = ("dot", "l2", {"name": "huber", "delta": 0.5}, "lp")


@IMPL
@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_chunk_of_one_token_is_read_before_it_is_written(
    impl: str, network: Any, objective: Any
) -> None:
    """Else both updates are the same: a query reads from `chunk` what a token earlier, and
    without a write of its own, it reads from `token`."""
    axes: Args = {"network": network, "objective": objective, "mini_batch": 1}
    rules = [
        Rule(**axes, optimiser="momentum", forgetting="decay", update=update)
        for update in ("token", "chunk")
    ]
    x = arguments(rules[0])
    ahead = F.pad(x["q"][:, 1:], (0, 0, 0, 0, 0, 1))  # token t reads with the next one's query
    want, first = fast_weights(**{**x, "q": ahead})
    got, second = fast_weights(**{**x, "spec": rules[1]}, impl=impl)
    close(second, first)
    close(got[:, 1:], want[:, :-1])


@IMPL
@pytest.mark.parametrize("row", [False, True])
def test_token_of_a_short_sequence(impl: str, row: bool) -> None:
    """A mini-batch that never fills: every token reads all that was written, its own, too, off
    weights that stay; and the state lacks nothing to go on with."""
    x = arguments(Rule(network={"name": "mlp", **ALL}, mini_batch=32))
    x["row"] = 0.5 + rand(32) if row else None
    o, state = fast_weights(**x, impl=impl)
    frozen, _ = fast_weights(**{**x, "lr": 0 * x["lr"]}, impl=impl)
    assert ((o - frozen).abs().amax((0, 2, 3)) > 1e-3).all()
    close(state["weights"], tuple(W.expand(B, *W.shape) for W in x["weights"]), 0.0)
    position = state["position"]
    assert position.shape == () and position.device.type == "cpu" and position == T
    assert not position.is_floating_point()
    given: Args = {"spec": x["spec"], "layer_norm": x["layer_norm"], "row": x["row"]}
    read = read_fast_weights(x["q"][:, -1:], x["weights"], **given, state=state)
    close(read, o[:, -1:])


@IMPL
@pytest.mark.parametrize("forgetting, place", [("none", "end"), ("norm", "start"), ("lq", "view")])
def test_chunk_of_a_short_sequence(impl: str, forgetting: str, place: Any) -> None:
    """Nothing is written before the mini-batch is full, to the last token of it, and nothing that
    was seen by then is lost."""
    rule = Rule(network="glu", update="chunk", forgetting=forgetting, place=place, mini_batch=T)
    x = arguments(rule)
    o, state = fast_weights(**part(x, 0, T - 1), impl=impl)
    for cut in range(1, T - 1, 6):
        _, first = fast_weights(**part(x, 0, cut), impl=impl)
        close(fast_weights(**part(x, cut, T - 1), state=first, impl=impl)[1], state)
    want = read_fast_weights(x["q"][:, :-1], x["weights"], spec=rule, state=state)
    close(o, want)
    close(state["weights"], tuple(W.expand(B, *W.shape) for W in x["weights"]), 0.0)
    assert all((U.abs().amax((-2, -1)) > 1e-3).all() for U in state["updates"])
    last, full = fast_weights(**part(x, T - 1, T), state=state, impl=impl)
    close(full, fast_weights(**x, impl=impl)[1])
    assert not any(U.any() for U in full["updates"])
    before, after = (
        read_fast_weights(x["q"][:, -1:], x["weights"], spec=rule, state=s) for s in (state, full)
    )
    close(last, before)
    assert (after - before).abs().max() > 1e-3


EDGES: Any = [("decay", "end"), ({"name": "norm", "decay": True, "eps": 1e-5}, "end")]
EDGES += [({"name": name, "decay": True}, "view") for name in ("lq", "kl")]
CHUNKS = [("chunk", *edge) for edge in EDGES]
VALUES = [(0, 0), (0, 1), (1, 0), (1, 1), ("mixed", "mixed")]


@pytest.mark.parametrize("momentum, decay", VALUES)
@pytest.mark.parametrize("update, forgetting, place", [("token", *EDGES[0]), *CHUNKS], ids=str)
def test_gates_of_exactly_zero_and_one(
    update: Any, forgetting: Any, place: Any, momentum: Any, decay: Any
) -> None:
    """Finite, with gradients, and the same in both implementations: nothing is divided by a gate
    nor by a product of gates."""
    rule = Rule(
        optimiser="momentum", forgetting=forgetting, place=place, update=update, mini_batch=5
    )
    x = arguments(rule)
    for name, value in (("momentum", momentum), ("decay", decay)):
        gate = rand(B, T, H).round() if value == "mixed" else torch.full((B, T, H), float(value))
        x[name] = gate.double().requires_grad_()
    results = [floats(fast_weights(**x, impl=impl)) for impl in IMPLS]
    first, second = (grads(found, leaves(x)) for found in results)
    close(results[1], results[0])
    close(second, first, 1e-9)
    assert all(torch.isfinite(g).all() for g in second)


@pytest.mark.parametrize("momentum", [False, True])
def test_muon_of_no_step(momentum: bool) -> None:
    """At rate 0 the direction of a step is 0 / eps, and its derivative finite (as large as 1 / eps
    times the slope of the iterations: compared to the largest gradient)."""
    optimiser = {"name": "muon", "momentum": momentum}
    x = arguments(Rule(network="glu", optimiser=optimiser, update="chunk", mini_batch=5))
    x["lr"] = torch.zeros(B, T, H).double().requires_grad_()
    results = [floats(fast_weights(**x, impl=impl)) for impl in IMPLS]
    first, second = (grads(found, leaves(x)) for found in results)
    close(results[1], results[0])
    close(second, first, 1e-9)
    still, _ = fast_weights(
        **{**x, "spec": Rule(network="glu", update="chunk")} | {"momentum": None}
    )
    close(results[0][0], still)


@pytest.mark.parametrize("update", ["token", "chunk"])
@pytest.mark.parametrize("C", [1, 16])
def test_groups_and_checkpoints(update: Any, C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of several groups of mini-batches is the specification; and with `checkpoint`,
    which computes groups again, it is itself."""
    monkeypatch.setattr(engine, "SEGMENT", 4 * 32)
    rule = Rule(optimiser="momentum", forgetting="decay", update=update, mini_batch=C)
    x = arguments(rule, 2, 73, 2)  # groups of 32 tokens
    want = floats(fast_weights(**x, impl="recurrent"))
    plain = floats(fast_weights(**x, impl="chunked"))
    again = floats(fast_weights(**x, impl="chunked", checkpoint=True))
    close(plain, want)
    close(again, plain, 0.0)
    first, second, third = (grads(found, leaves(x)) for found in (want, plain, again))
    close(second, first, 1e-9)
    close(third, second, 1e-12)


@IMPL
@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("update", ["token", "chunk"])
def test_tokens_before_a_change_are_the_same_bits(impl: str, network: Any, update: Any) -> None:
    rule = Rule(
        network=network, optimiser="momentum", forgetting="decay", update=update, mini_batch=5
    )
    x = arguments(rule)
    with torch.no_grad():
        o, _ = fast_weights(**x, impl=impl)
        for t, name in itertools.product((0, 3, 5, 14, T - 1), ("q", "k", "v", "lr", "decay")):
            changed = x[name].clone()
            changed[:, t] = 0.9
            other, _ = fast_weights(**{**x, name: changed}, impl=impl)
            assert other[:, :t].equal(o[:, :t])
            reads = name == "q" or update == "token"
            assert not reads or not other[:, t].equal(o[:, t])


def test_products_with_zeros() -> None:
    """Values and gradients by a plain loop, which divides by nothing."""
    x = rand(3, 9)
    x[0, 2], x[1, 0], x[1, 4], x[1, 5], x[2] = 0, 0, 0, 1, 0
    x.requires_grad_()
    L, zero = products(x), torch.zeros(3).double()
    loop = [[x[:, j + 1 : i + 1].prod(-1) if j <= i else zero for j in range(9)] for i in range(9)]
    want = torch.stack([torch.stack(row, -1) for row in loop], -2)
    close(L, want, 1e-15)
    close(grads([L], [x]), grads([want], [x]), 1e-13)
    tiny = products(torch.full((40,), 0.1).double())
    assert tiny[39, 0] == 0 and 0 < tiny[19, 1] < 1e-17  # never a denormal


TOKEN_AXES: dict[str, Any] = {
    "network": (*NETWORKS, {"name": "mlp", "depth": 3, "expansion": 1.5}, {"name": "glu", **ALL}),
    "objective": OBJECTIVES,
    "optimiser": ("sgd", "momentum"),
    "forgetting": ("none", "decay", "norm", {"name": "norm", "decay": True, "eps": 1e-5}),
    "mini_batch": (1, 5, 7),
    "row": (False, True),
    "rate per matrix": (False, True),
}
STRIDE = 37


def token_points() -> list[tuple[Any, ...]]:
    """Every STRIDE-th combination but those that are refused."""
    points = list(itertools.product(*TOKEN_AXES.values()))[::STRIDE]
    refused = [f != "none" and "norm" in str(f) and "bias" in str(n) for n, _, _, f, *_ in points]
    return [point for point, is_refused in zip(points, refused, strict=True) if not is_refused]


def test_token_points_have_every_option() -> None:
    assert all(math.gcd(STRIDE, len(options)) == 1 for options in TOKEN_AXES.values())
    for place, options in enumerate(TOKEN_AXES.values()):
        assert all(any(point[place] == option for point in token_points()) for option in options)


@pytest.mark.parametrize("point", token_points(), ids=str)
def test_token_crossed(point: tuple[Any, ...]) -> None:
    """What `update: token` alone has, a row factor, crossed with all else that it allows: few of
    the points of all axes together have it."""
    *axes, row, per_matrix = point
    rule = Rule(**dict(zip(TOKEN_AXES, axes, strict=False)))
    x = arguments(rule)
    if row:
        x["row"] = (0.2 + rand(rule.mini_batch)).requires_grad_()
    if per_matrix:
        x["lr"] = (0.1 * rand(B, T, H, len(x["weights"]))).requires_grad_()
    want = fast_weights(**x, impl="recurrent")
    cut = int(torch.randint(1, T, ()))
    first, state = fast_weights(**part(x, 0, cut), impl="chunked")
    second, state = fast_weights(**part(x, cut, T), state=state, impl="chunked")
    got = (torch.cat((first, second), 1), state)
    close(got, want)
    wanted = grads(floats(want), leaves(x))
    close(grads(floats(got), leaves(x)), wanted, 1e-9)
    assert all(g.any() for g in wanted)  # else they would prove nothing


VALUES_REFUSED: Any = [
    ("forgetting", {"name": "norm", "eps": -1.0}, "eps: must not be negative, got -1.0"),
    ("forgetting", {"name": "lq", "q": 1.5}, "q: must be at least 2, got 1.5"),
    ("objective", {"name": "huber", "delta": 0.0}, "delta: must be positive"),
    ("optimiser", {"name": "muon", "eps": 0.0}, "eps: must be positive"),
    ("network", {"name": "mlp", "expansion": 0.0}, "expansion: must be positive"),
    ("network", {"name": "mlp", "depth": 1}, "depth 1 is 'linear'"),
    ("network", {"name": "glu", "expansion": -1.0}, "expansion: must be positive"),
    ("optimiser", {"momentum": True}, "expected a name or a mapping with a name"),
]


@pytest.mark.parametrize("axis, value, reason", VALUES_REFUSED)
def test_values_are_refused_where_they_stand(axis: str, value: Any, reason: str) -> None:
    with pytest.raises(SpecError, match=f"^{axis}: .*{reason}"):
        Rule(**{axis: value})


def test_op_refuses_what_shapes_and_updates_exclude() -> None:
    x = arguments(Rule(network={"name": "linear", "residual": True}, mini_batch=5))
    with pytest.raises(SpecError, match=r"residual needs K = V, got 4 and 3"):
        fast_weights(**{**x, "v": x["v"][..., :3]})
    chunk = Rule(network={"name": "linear", "residual": True}, mini_batch=5, update="chunk")
    with pytest.raises(SpecError, match=r"row: .* which update 'chunk' does not"):
        fast_weights(**{**x, "spec": chunk, "row": rand(5)})
