"""Gated networks with `update: chunk`: the kernels between library products, as one operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from layerzoo.memories.fast_weights import Rule, fast_weights
from layerzoo.memories.fast_weights.op import OP
from layerzoo.memories.fast_weights.optimisers import Muon
from layerzoo.memories.fast_weights.state import init_state
from layerzoo.ops import ImplError

from .conftest import DTYPES, OTHERS

IMPLS = ("triton", "chunked")
GPU = torch.cuda.is_available()
BASE: dict[str, Any] = {"network": "glu", "update": "chunk", "mini_batch": 96 if GPU else 6}
ALLMEM = BASE | {
    "network": {"name": "glu", "residual": True, "expansion": 2.0},
    "optimiser": "momentum",
    "forgetting": "norm",
    "place": "start",
}
LACT = BASE | {
    "objective": "dot",
    "optimiser": "momentum",
    "forgetting": {"name": "norm", "eps": 1e-5},
}
MUON = {"name": "muon", "momentum": True}
RULES = {
    "allmem": ALLMEM,
    "lact": LACT,
    "view": LACT | {"place": "view", "objective": "l2"},
    "plain": BASE,
    "decay": ALLMEM | {"forgetting": {"name": "norm", "decay": True}, "place": "view"},
    "decay_start": ALLMEM | {"forgetting": {"name": "norm", "decay": True}},
    "decay_end": LACT | {"forgetting": {"name": "norm", "decay": True}, "objective": "l2"},
    "linear_decay": BASE | {"forgetting": "decay", "optimiser": "momentum", "objective": "dot"},
    "single": ALLMEM | {"mini_batch": 1, "forgetting": {"name": "norm", "decay": True}},
    "muon": LACT | {"optimiser": MUON, "mini_batch": 128 if GPU else 16},
    "muon_view": LACT | {"optimiser": "muon", "place": "view", "mini_batch": 128 if GPU else 16},
}
WIDE = ("weights", "lr", "momentum", "decay", "state")


def tensors(
    rule: Rule,
    T: int,
    B: int = 2,
    H: int = 2,
    K: int = 8,
    V: int = 5,
    past: int | None = None,
    rates: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs in float64. past: position of a state, None for none."""
    g = torch.Generator().manual_seed(seed)
    V = K if rule.network.residual else V

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    weights = tuple(normal(H, i, o) / i**0.5 for i, o in rule.network.shapes(K, V))
    found: dict[str, Any] = {
        "q": F.normalize(normal(B, T, H, K), dim=-1),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "weights": weights,
        "lr": 0.2 * uniform(B, T, H, rates),
        "momentum": uniform(B, T, H) if rule.has_momentum else None,
        "decay": 0.1 * uniform(B, T, H) if rule.has_decay else None,
    }
    if past is not None:
        state = init_state(rule, weights, B)
        state = {
            name: tuple(w + 0.3 * normal(*w.shape) for w in x) if isinstance(x, tuple) else x
            for name, x in state.items()
        }
        done = past % rule.mini_batch
        if "retention" in state:
            state["retention"] = (0.9 + 0.1 * uniform(B, H)) if done else torch.ones(B, H).double()
        if "momentum_sum" in state:
            state["momentum_sum"] = uniform(B, H) * done
        if not done and "updates" in state:
            state["updates"] = tuple(torch.zeros_like(w) for w in state["weights"])
        if "position" in state:
            state["position"] = torch.tensor(past)
        found["state"] = state
    return {name: x for name, x in found.items() if x is not None}


def call(rule: Rule) -> Any:
    return lambda impl, weights, **x: fast_weights(
        x.pop("q"), x.pop("k"), x.pop("v"), weights, spec=rule, impl=impl, **x
    )


SHAPES: dict[str, Any] = {
    "token": lambda C: {"T": 1},
    "below": lambda C: {"T": C - 2},
    "exact": lambda C: {"T": C, "K": 7, "V": 12},
    "several": lambda C: {"T": (3 if GPU else 2) * C + 2},
    "pending": lambda C: {"T": 2 * C, "past": C + 2, "rates": 1},
    "still pending": lambda C: {"T": 1, "past": 2},
    "wide": lambda C: {"T": C + 1, "B": 1, "H": 1, "K": 72},
    "between": lambda C: {"T": C + 1, "past": 2 * C},
}


def shape_of(rule: Rule, shape: str) -> dict[str, Any]:
    """On a GPU chunks are long: few of them, of many channels."""
    found = SHAPES[shape](rule.mini_batch)
    if isinstance(rule.optimiser, Muon) or rule.mini_batch == 1:
        found["B"] = 4  # rounding is amplified, or sums are short: an average of more
    if GPU:
        found |= {"T": min(found["T"], 300), "K": 128 if shape == "exact" else 64, "V": 64}
    return found


CASES = [("allmem", s) for s in SHAPES] + [("lact", s) for s in ("exact", "several", "pending")]
CASES += [(r, "several" if n % 2 else "pending") for n, r in enumerate(list(RULES)[2:])]


# Without a GPU the dtypes take turns in the two rules of many shapes; the others have both.
RUNS = [
    (name, shape, dtype)
    for n, (name, shape) in enumerate(CASES)
    for m, dtype in enumerate(DTYPES)
    if GPU or name not in ("allmem", "lact") or (n + m + (name == "lact")) % 2 == 0
]


@pytest.mark.parametrize(("name", "shape", "dtype"), RUNS, indirect=["dtype"], ids=str)
def test_outputs_and_gradients(judge: Any, name: str, shape: str, dtype: torch.dtype) -> None:
    rule = Rule(**RULES[name])
    judge(OP, call(rule), tensors(rule, **shape_of(rule, shape)), wide=WIDE)


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True)
def test_a_library_may_add_the_terms_of_a_product_to_q_one_by_one(
    judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on a CPU without vectors."""

    def one_by_one(q: Tensor, a: Tensor, b: Tensor) -> Tensor:
        for x, y in zip(a.split(1, -1), b.split(1, -2), strict=True):
            q = q + x @ y
        return q

    monkeypatch.setattr(torch, "baddbmm", one_by_one)
    rule = Rule(**ALLMEM)
    judge(OP, call(rule), tensors(rule, **shape_of(rule, "wide")), wide=WIDE)


def run(rule: Rule, device: Any, impl: str = "triton", state: Any = None, **x: Any) -> Any:
    def cast(t: Tensor) -> Tensor:
        return t.float().to(device) if t.is_floating_point() else t

    return call(rule)(impl, state=state, **tree_map(cast, x))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["allmem", "lact"]
    + [pytest.param(n, marks=OTHERS) for n in ("view", "decay_start", "single", "muon")],
)
def test_pieces_and_tokens_equal_the_whole(poison: None, device: Any, name: str) -> None:
    """Tokens without gradients are decoded by a kernel of their own."""
    rule = Rule(**RULES[name] | {"mini_batch": min(5, Rule(**RULES[name]).mini_batch)})
    given = tensors(rule, T=13)
    whole, end = run(rule, device, **given)
    for cuts in ((7, 5, 1), (1,) * 13):
        state, found, t = None, [], 0
        for n in cuts:
            part = {name: x if name == "weights" else x[:, t : t + n] for name, x in given.items()}
            before = None if state is None else tree_map(torch.clone, state)
            o, new = run(rule, device, state=state, **part)
            if state is not None:
                close(state, before)
            found.append(o)
            state, t = new, t + n
        close(torch.cat(found, 1), whole)
        close(state, end)


def test_decodes_many_channels(poison: None, device: Any) -> None:
    """More than a tile has, in each direction."""
    rule = Rule(**ALLMEM | {"mini_batch": 2})
    given = tensors(rule, T=4, B=1, H=1, K=72)
    state: Any = None
    for t in range(3):
        part = {n: x if n == "weights" else x[:, t : t + 1] for n, x in given.items()}
        made, want = (run(rule, device, impl, state=state, **part) for impl in IMPLS)
        close(made, want)
        state = made[1]


def test_groups_of_chunks_equal_one(poison: None, device: Any, monkeypatch: Any) -> None:
    """A long sequence is worked off in groups, whose activations fit."""
    from layerzoo.kernels.fast_weights import chunk_parts

    rule = Rule(**ALLMEM | {"mini_batch": 5})
    given = tensors(rule, T=23)

    def outcome() -> Any:
        leaf = given["k"].float().to(device).requires_grad_()
        o, state = call(rule)(
            "triton",
            **tree_map(lambda t: t.float().to(device), {n: x for n, x in given.items()})
            | {"k": leaf},
        )
        (g,) = torch.autograd.grad(o.sum() + state["weights"][0].square().sum(), leaf)
        return o, g

    one = outcome()
    monkeypatch.setattr(chunk_parts, "GROUP", 2 * 5 * 4 * 10)  # of two chunks
    close(outcome(), one)


def test_an_empty_sequence_returns_the_state(device: Any) -> None:
    rule = Rule(**ALLMEM)
    given = tensors(rule, T=0, past=2)
    state = tree_map(lambda x: x.to(device), given.pop("state"))
    state = tree_map(lambda x: x.float() if x.is_floating_point() else x.cpu(), state)
    o, new = run(rule, device, state=state, **given)
    assert o.shape == given["v"].shape
    assert new is state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": {"name": "glu", "bias": True}, "forgetting": "none"}, "neither bias"),
        ({"network": "mlp", "forgetting": "none"}, "'glu' alone, not 'mlp'"),
        ({"objective": "huber"}, "not 'huber'"),
        ({"forgetting": "kl", "place": "view"}, "no forgetting 'kl'"),
    ],
)
def test_refuses_with_a_reason(device: Any, change: Any, reason: str) -> None:
    rule = Rule(**LACT | change)
    given = tensors(rule, T=3, rates=1)
    if rule.network.bias:
        given["weights"] = tuple(
            torch.nn.functional.pad(w, (0, 0, 0, 1)) for w in given["weights"]
        )
    with pytest.raises(ImplError, match=reason):
        run(rule, device, **given)


def test_compiles_as_one_operator(device: Any) -> None:
    rule = Rule(**ALLMEM)
    x = tree_map(lambda t: t.float().to(device), tensors(rule, T=2 * rule.mini_batch + 2))
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v", "lr")]

    def loss() -> Tensor:
        o, state = call(rule)("triton", **x)
        return o.square().sum() + state["updates"][1].sum() + state["weights"][0].square().sum()

    from layerzoo.kernels import fast_weights as kernel  # imports are no part of the graph

    assert kernel.run is not None
    want = torch.autograd.grad(loss(), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(), leaves), want)


def test_autocast_leaves_states_wide(device: Any) -> None:
    rule = Rule(**ALLMEM)
    given = tensors(rule, T=rule.mini_batch + 2)
    want, _ = run(rule, device, **given)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o, state = run(rule, device, **given)
    close(o, want)
    assert state["weights"][0].dtype == torch.float32


def test_a_second_derivative_raises(device: Any) -> None:
    rule = Rule(**LACT)
    x = tree_map(lambda t: t.float().to(device), tensors(rule, T=rule.mini_batch + 1))
    q = x["q"].requires_grad_()
    o, _ = call(rule)("triton", **x)
    (g,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), q)


def test_the_steps_of_muon_are_the_portable_ones() -> None:
    from layerzoo.kernels.fast_weights import muon
    from layerzoo.memories.fast_weights import optimisers

    assert muon.NEWTON_SCHULZ == optimisers.NEWTON_SCHULZ
