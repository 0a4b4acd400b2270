"""Layers made of layers, and layers that are a limit of another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from layerzoo import build
from layerzoo.layer import Reach
from layerzoo.model import LanguageModel
from layerzoo.spec import SpecError
from layerzoo.train.callbacks import Controls

X = torch.randn(2, 30, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WINDOW = {"name": "sliding", "heads": 2, "window": 5}


@pytest.mark.parametrize("memory", ["linear", "gated_delta"])
def test_parallel_starts_as_its_first_child_at_scale_zero(memory: str) -> None:
    layer = build("parallel", dim=24, children=[WINDOW, memory], scale_init=0.0).double()
    y, state = layer(X)
    first, first_state = layer.layers[0](X)
    assert torch.equal(y, first) and torch.equal(state[0]["k"], first_state["k"])
    y.sum().backward()  # and yet the scale learns: the memory can grow in
    assert layer.scales.grad.abs().min() > 0


def test_parallel_scales_channels() -> None:
    layer = build("parallel", dim=24, children=[WINDOW, "linear"]).double()
    with torch.no_grad():
        layer.scales.copy_(torch.arange(24.0))
    window, memory = (child(X)[0] for child in layer.layers)
    assert torch.allclose(
        layer(X)[0], window + torch.arange(24.0).double() * memory, rtol=0, atol=1e-12
    )


def test_children_may_be_built_and_shared_specs_are_not_shared_weights() -> None:
    child = build("linear", dim=24, heads=2)
    layer = build("parallel", dim=24, children=[child, "linear", "linear"])
    assert layer.layers[0] is child
    assert layer.layers[1].q.weight is not layer.layers[2].q.weight
    assert layer.spec()["children"][0]["heads"] == 2


def test_impl_reaches_every_child() -> None:
    layer = build(
        "parallel", dim=24, children=[WINDOW, {"name": "parallel", "children": ["linear"]}]
    )
    layer.impl = "recurrent"
    assert layer.layers[1].layers[0].impl == "recurrent"


def test_reach_is_that_of_the_furthest_child() -> None:
    wide = {"name": "sliding", "heads": 2, "window": 9, "sinks": 2}
    assert build("parallel", dim=24, children=[WINDOW, wide]).reach() == Reach(8, 2)
    assert build("parallel", dim=24, children=[WINDOW, "linear"]).reach() is None


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [30, 31, 500])
def test_a_window_longer_than_the_sequence_is_full_attention(window: int, sinks: int) -> None:
    full = build("softmax", dim=24, heads=2).double()
    sliding = build("sliding", dim=24, heads=2, window=window, sinks=sinks).double()
    sliding.load_state_dict(full.state_dict())
    assert torch.allclose(sliding(X)[0], full(X)[0], rtol=0, atol=1e-12)


def parallel(*children: Any, **fields: Any) -> Any:
    return build("parallel", dim=24, children=list(children), **fields).double()


@pytest.mark.parametrize("sinks", [0, 2])
def test_evicted_writes_what_has_left_the_window(sinks: int) -> None:
    """At token i the memory holds tokens sinks .. i - window, and the window the rest."""
    window = {**WINDOW, "sinks": sinks}
    layer = parallel(window, {"name": "linear", "heads": 2, "out_norm": "none"}, write="evicted")
    memory = layer.layers[1]
    y, state = layer(X)
    q, write = memory.project(X)
    want = layer.layers[0](X)[0]
    for i in range(X.shape[1]):
        k, v = (getattr(write, name)[:, sinks : max(sinks, i - 5 + 1)] for name in "kv")
        S = torch.einsum("bthk,bthv->bhkv", k, v)
        o = torch.einsum("bhk,bhkv->bhv", q[:, i], S) * memory.scale
        want[:, i] += memory.merge(o.unsqueeze(1), X[:, i : i + 1])[:, 0]
    assert torch.allclose(y, want, rtol=0, atol=1e-12)
    assert state[-1]["writes"][0]["k"].shape[1] == 5 and state[-1]["position"] == 30
    assert torch.equal(state[-1]["writes"][0]["v"], write.v[:, -5:])


@pytest.mark.parametrize("memory", ["linear", "gated_delta", "ttt_mlp", "allmem"])
def test_evicted_with_a_window_above_the_length_writes_nothing(memory: str) -> None:
    layer = parallel({**WINDOW, "window": 28, "sinks": 2}, memory, write="evicted")
    _, state = layer(X)
    for got, want in zip(
        tree_leaves(state[1]), tree_leaves(layer.layers[1].init_state(2)), strict=True
    ):
        assert torch.equal(got, want)
    assert "no token ever leaves a window of 28" in layer.cautions(30)[0]
    assert layer.cautions(2000) == []
    (early,) = build("parallel", dim=24, children=[WINDOW, "allmem"], write="evicted").cautions(60)
    assert "mini-batch of 512 never fills in sequences of 55 tokens" in early


@pytest.mark.parametrize("share", ["qkv", "qkvo"])
def test_shared_projections_are_one(share: str) -> None:
    children = [WINDOW, {"name": "gated_delta", "heads": 3}]
    alone, layer = parallel(*children), parallel(*children, share=share)
    names = ["q", "k", "v", "out"] if share == "qkvo" else ["q", "k", "v"]
    window, memory = layer.layers
    for name in names:
        assert getattr(memory, name) is getattr(window, name)
    assert (memory.out is window.out) == (share == "qkvo")
    theirs = {f"layers.1.{name}.weight": getattr(window, name).weight for name in names}
    assert not theirs.keys() & layer.state_dict().keys()  # a file holds them once
    alone.load_state_dict({**layer.state_dict(), **theirs})
    assert torch.allclose(layer(X)[0], alone(X)[0], rtol=0, atol=1e-14)
    count = sum(p.numel() for p in alone.parameters()) - sum(p.numel() for p in layer.parameters())
    assert count == len(names) * 24 * 24


@pytest.mark.parametrize("every", [None, 7])
def test_shared_projections_of_grouped_heads_are_repeated(every: int | None) -> None:
    """A window of 4 heads in 2 groups; its memory may be within a `reset`."""
    window = {"name": "sliding", "heads": 4, "kv_heads": 2, "window": 4}
    memory: dict[str, Any] = {"name": "gated_delta", "heads": 4}
    if every:
        memory = {"name": "reset", "children": [memory], "every": every}
    alone, layer = parallel(window, memory), parallel(window, memory, share="qkvo")
    prefix = "layers.1.layers.0." if every else "layers.1."
    weights = dict(layer.state_dict())
    for name in ("q", "k", "v", "out"):
        weight = getattr(layer.layers[0], name).weight
        if name in ("k", "v"):
            weight = weight.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
        weights[f"{prefix}{name}.weight"] = weight
    alone.load_state_dict(weights)
    assert torch.allclose(layer(X)[0], alone(X)[0], rtol=0, atol=1e-14)


def test_window_dropout_leaves_rows_without_the_window() -> None:
    layer = parallel(WINDOW, "linear", drop=0.5)
    x = X[:1].repeat(64, 1, 1)
    window, memory = (child(x)[0] for child in layer.layers)
    torch.manual_seed(0)
    y, _ = layer(x)
    dropped = [bool(torch.allclose(row, m)) for row, m in zip(y, memory, strict=True)]
    assert 16 < sum(dropped) < 48
    kept = torch.tensor(dropped).logical_not()
    assert torch.allclose(y[kept], (window + memory)[kept], rtol=0, atol=1e-12)
    layer.eval()
    assert torch.allclose(layer(x)[0], window + memory, rtol=0, atol=1e-12)


def test_children_can_be_switched_off() -> None:
    layer = parallel(WINDOW, "linear").eval()
    window, memory = (child(X)[0] for child in layer.layers)
    layer.off = (0,)
    assert torch.allclose(layer(X)[0], memory, rtol=0, atol=1e-12)
    layer.off = (1,)
    assert torch.equal(layer(X)[0], window)


@pytest.mark.parametrize("residual", [False, True])
def test_sequential(residual: bool) -> None:
    one = build("sequential", dim=24, children=["gated_delta"], residual=residual).double()
    y, state = one(X)
    want, want_state = one.layers[0](X)
    assert torch.equal(y, want) and torch.equal(state[0], want_state)
    two = build("sequential", dim=24, children=["linear", WINDOW], residual=residual).double()
    a = two.layers[0](X)[0]
    b = two.layers[1](X + a if residual else a)[0]
    assert torch.allclose(two(X)[0], a + b if residual else b, rtol=0, atol=1e-12)
    assert build("sequential", dim=24, children=[WINDOW, WINDOW]).reach() == Reach(8, 0)


def test_gated() -> None:
    layer = build("gated", dim=24, children=[WINDOW, "linear"]).double()
    a, b = (child(X)[0] for child in layer.layers)
    g = (X @ layer.gate.weight.mT + layer.gate.bias).sigmoid()
    assert torch.allclose(layer(X)[0], g * a + (1 - g) * b, rtol=0, atol=1e-12)
    layer = build("gated", dim=24, children=[WINDOW, "linear"], gate="tanh").double()
    assert torch.equal(layer(X)[0], layer.layers[0](X)[0])
    with torch.no_grad():
        layer.gate.weight.normal_()
    a, b = (child(X)[0] for child in layer.layers)
    want = a + (X @ layer.gate.weight.mT).tanh() * b
    assert torch.allclose(layer(X)[0], want, rtol=0, atol=1e-12)


def test_heads_share_one_output_projection() -> None:
    children = [{"name": "sliding", "heads": 3, "window": 4}, {"name": "delta", "heads": 1}]
    layer = build("heads", dim=24, children=children).double()
    window, memory = layer.layers
    assert (window.key_dim, memory.key_dim, memory.value_dim) == (6, 6, 6)
    outs = []
    for child in layer.layers:
        child.out.register_forward_pre_hook(lambda _, args: outs.append(args[0]))
    y, _ = layer(X)
    W = torch.cat([child.out.weight for child in layer.layers], 1)
    assert torch.allclose(y, torch.cat(outs, -1) @ W.mT, rtol=0, atol=1e-12)
    assert W.shape == (24, 24)


@pytest.mark.parametrize("pieces", [[30], [5, 11, 14]])
def test_reset_forgets(pieces: list[int]) -> None:
    layer = build("reset", dim=24, children=["gated_delta"], every=7).double()
    want = torch.cat([layer.layers[0](segment)[0] for segment in X.split(7, 1)], 1)
    state, outs = None, []
    for x in X.split(pieces, 1):
        y, state = layer(x, state)
        outs.append(y)
    assert torch.allclose(torch.cat(outs, 1), want, rtol=0, atol=1e-12)
    assert layer.reach() == Reach(6)
    layer.every = None
    assert torch.equal(layer(X)[0], layer.layers[0](X)[0]) and layer.reach() is None


def test_controls_switch_while_testing() -> None:
    reset = {"name": "reset", "children": ["linear"], "every": None}
    config: Any = {"layers": [{"name": "parallel", "children": [WINDOW, reset]}], "dim": 24}
    lit: Any = SimpleNamespace(model=LanguageModel(vocab_size=8, depth=2, **config))
    layers = [block.layer for block in lit.model.blocks]
    controls = Controls(off=[0], every=5)
    for start, end in (
        (controls.on_validation_start, controls.on_validation_end),
        (controls.on_test_start, controls.on_test_end),
    ):
        start(None, lit)
        assert all(layer.off == (0,) and layer.layers[1].every == 5 for layer in layers)
        end(None, lit)
        assert all(layer.off == () and layer.layers[1].every is None for layer in layers)
    plain: Any = SimpleNamespace(model=LanguageModel(vocab_size=8, dim=24, layers=["linear"]))
    with pytest.raises(SpecError, match="Controls: off: no layer of this model"):
        Controls(off=[1]).on_test_start(None, plain)


def test_prefix_is_attention_over_memory_and_segment() -> None:
    """Token by token from the modules: what is retrieved, what is seen, what is written."""
    spec: Any = {"children": [{"name": "linear", "heads": 2}], "heads": 2, "rotary": None}
    spec |= {"qk_norm": "none"}
    layer = build("prefix", dim=24, segment=7, persistent=3, **spec).double()
    memory = layer.layers[0]
    now = last = memory.init_state(2)
    outs: list[torch.Tensor] = []
    for i in range(30):
        if i % 7 == 0:
            last, tokens, retrieved = now, [], []
        x = X[:, i : i + 1]
        q, _ = memory.project(x)
        tokens.append(x)
        retrieved.append(memory.merge(memory.read(q, last), x))
        seen = torch.cat((*retrieved, *tokens), 1)
        k, v = (
            torch.cat((p.expand(2, 3, 2, 12), proj(seen).unflatten(-1, (2, 12))), 1)
            for p, proj in ((layer.first_k, layer.k), (layer.first_v, layer.v))
        )
        weights = torch.einsum("bhk,bnhk->bhn", layer.q(x).view(2, 2, 12), k) / 12**0.5
        o = torch.einsum("bhn,bnhv->bhv", weights.softmax(-1), v)
        y = layer.out(o.reshape(2, 1, 24))
        o, now = memory.mix(*memory.project(y), now)
        outs.append(y * memory.merge(o, y).sigmoid())
    assert torch.allclose(layer(X)[0], torch.cat(outs, 1), rtol=0, atol=1e-12)


REFUSED: Any = [
    ("prefix", {"children": ["softmax"]}, r"children\[0\]: softmax is no memory"),
    ("prefix", {"children": ["linear"], "heads": 8}, "rotary: needs an even dim / heads, got 3"),
    ("prefix", {"children": ["linear"], "segment": 0}, "segment: must be at least 1"),
    ("parallel", {"children": ["softmax", "linear"], "write": "evicted"}, "needs a window"),
    ("parallel", {"children": [WINDOW, "softmax"], "write": "evicted"}, "is for memories"),
    ("parallel", {"children": [WINDOW, "linear"], "drop": 1.0}, r"drop: must be in \[0, 1\)"),
    (
        "parallel",
        {"children": [WINDOW, {"name": "linear", "key_dim": 3}], "share": "qkv"},
        r"children\[1\]: share: its projection 'q' has shape \(12, 24\), and sliding's \(24, 24\)",
    ),
    ("parallel", {"children": [WINDOW, "parallel"], "share": "qkv"}, "children: missing"),
    (
        "parallel",
        {"children": [{"name": "reset", "children": ["linear"]}, "linear"], "share": "qkv"},
        "reset has no projection 'q'",
    ),
    ("gated", {"children": [WINDOW]}, "children: needs 2, got 1"),
    ("sequential", {"children": []}, "children: needs at least one layer"),
    ("reset", {"children": ["linear"], "every": 0}, "every: must be at least 1 or null"),
    ("heads", {"children": [{"name": "linear", "key_dim": 3}]}, "key_dim: leave it out"),
    ("heads", {"children": [{"name": "linear", "heads": 5}]}, "heads of all: 5 does not divide"),
    ("heads", {"children": [{"name": "reset", "children": ["linear"]}]}, "reset has no heads"),
]


@pytest.mark.parametrize("name, fields, message", REFUSED)
def test_refused(name: str, fields: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(name, dim=24, **fields)
