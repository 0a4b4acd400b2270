"""Layers made of layers, and layers that are a limit of another."""

from __future__ import annotations

import pytest
import torch

from layerzoo import build
from layerzoo.layer import Reach

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
    assert torch.allclose(layer(X)[0], window + torch.arange(24.0).double() * memory, atol=1e-12)


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
    assert torch.allclose(sliding(X)[0], full(X)[0], atol=1e-12)
