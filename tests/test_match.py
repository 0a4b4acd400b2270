"""Matching: arms of equal parameters, FLOPs or state bytes, and what cannot be made equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._pytree import tree_leaves

from layerzoo.ablations.cells.configs import resolve
from layerzoo.ablations.cells.match import Match, match_models, search_knob
from layerzoo.model import LanguageModel
from layerzoo.spec import SpecError
from layerzoo.support.yaml_files import config_path, read_yaml

LAYERS: dict[str, Any] = {
    "linear": {"name": "linear", "heads": 2},
    "gated_delta": {"name": "gated_delta", "heads": 2},
    "sliding": {"name": "sliding", "heads": 2, "window": 8},
    "softmax": {"name": "softmax", "heads": 2},
}
BASE = resolve(OmegaConf.to_container(read_yaml(config_path("mqar")), resolve=False))
LENGTH = 64


def config(*layers: Any, **network: Any) -> dict[str, Any]:
    tree = copy.deepcopy(BASE)
    tree["model"]["network"] |= {"layers": [*layers], "overrides": None, **network}
    return tree


def solve(match: Match, **configs: dict[str, Any]) -> dict[str, tuple[dict[str, Any], Any]]:
    return match_models(match, configs, {arm: {"layer": arm} for arm in configs})


def measured(tree: dict[str, Any]) -> dict[str, float]:
    """The figures of a model that is built and run."""
    model = LanguageModel(**tree["model"]["network"])
    with torch.no_grad():
        _, state = model.hidden(torch.zeros(1, LENGTH, dtype=torch.int64))
    leaves = tree_leaves(state)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(leaf.nbytes for leaf in leaves),
        "flops": model.flops_per_token(LENGTH),
    }


@pytest.mark.parametrize("by", ["parameters", "state_bytes", "flops"])
@pytest.mark.parametrize("to", LAYERS)
def test_arms_are_made_equal(by: Any, to: str) -> None:
    """A wide MLP behind every layer, so that parameters differ from arm to arm to begin with."""
    configs = {arm: config(layer) for arm, layer in LAYERS.items()}
    configs |= {"wide": config(LAYERS["linear"], mlp=2.0, dim=48)}
    result = solve(Match(by=by, to={"layer": to}), **configs)
    target = measured(configs[to])[by]
    for arm, (tree, record) in result.items():
        assert record["target"] == target
        assert record["achieved"] == measured(tree)[by], arm
        assert abs(record["deviation"]) <= 0.05 and record["by"] == by
        assert record["deviation"] == pytest.approx(record["achieved"] / target - 1)
        assert (tree == configs[arm]) == (not record["solved"])
        assert {n: v for n, v in tree.items() if n != "model"} == {
            n: v for n, v in configs[arm].items() if n != "model"
        }
    assert result[to][0] == configs[to]


def test_the_first_knob_that_suffices_is_turned() -> None:
    """Half the heads, double the state of a matrix memory; the width would do as well."""
    arms = {"small": config({"name": "linear", "heads": 4}), "big": config(LAYERS["linear"])}
    _, record = solve(Match(by="state_bytes", to="big"), **arms)["small"]
    assert record["solved"] == {"heads": 2}
    _, record = solve(Match(by="state_bytes", to="big", solve=["dim", "heads"]), **arms)["small"]
    assert [*record["solved"]] == ["dim"] and record["solved"]["dim"] % 4 == 0


def test_an_arm_within_tolerance_is_left_alone() -> None:
    arms = {"linear": config(LAYERS["linear"]), "gated_delta": config(LAYERS["gated_delta"])}
    tree, record = solve(Match(by="parameters"), **arms)["gated_delta"]
    assert tree == arms["gated_delta"] and record["solved"] == {}
    assert record["deviation"] == pytest.approx(0.0125)
    _, record = solve(Match(by="parameters", tolerance=0.01), **arms)["gated_delta"]
    assert record["solved"] == {"heads": 1}


def test_a_number_is_a_target() -> None:
    tree, record = solve(Match(by="parameters", to=100_000, solve=["dim"]), a=config("linear"))[
        "a"
    ]
    assert record["target"] == 100_000 and record["solved"] == {"dim": 104}
    assert measured(tree)["parameters"] == record["achieved"]


def test_a_knob_is_turned_wherever_a_layer_has_it() -> None:
    window = {"name": "sliding", "heads": 2, "window": 8}
    hybrid = {"name": "parallel", "children": [window, "gated_delta"]}
    network = {
        "layers": {"a": hybrid, "b": "forgetting", "c": "linear"},
        "pattern": "a b c",
        "overrides": {0: {"children": [window, "linear"]}, -1: {"heads": 2}},
        "depth": 3,
    }
    tree = config(**network)
    match = Match(by="state_bytes", to=60_000, solve=["window"])
    tree, record = solve(match, a=tree)["a"]
    found = record["solved"]["window"]
    layers, overrides = tree["model"]["network"]["layers"], tree["model"]["network"]["overrides"]
    assert found > 8 and layers["b"] == {"name": "forgetting", "window": found}
    assert layers["a"]["children"] == [{**window, "window": found}, {"name": "gated_delta"}]
    assert layers["c"] == {"name": "linear"} and overrides[-1] == {"heads": 2}
    assert overrides[0]["children"][0]["window"] == found
    assert measured(tree)["state_bytes"] == record["achieved"]
    match = Match(by="state_bytes", to=0.8 * record["achieved"], solve=["heads"], tolerance=0.1)
    tree, record = solve(match, a=tree)["a"]
    network, heads = tree["model"]["network"], record["solved"]["heads"]
    assert heads not in (2, 4) and network["overrides"][-1] == {"heads": heads}
    assert network["layers"]["b"] == {"name": "forgetting", "heads": heads, "window": found}
    assert "heads" not in network["layers"]["a"]
    assert measured(tree)["state_bytes"] == record["achieved"]


def test_a_value_no_larger_than_needed() -> None:
    """A window as long as the sequence has all of the state; a longer one changes nothing."""
    arms = {"softmax": config(LAYERS["softmax"]), "sliding": config(LAYERS["sliding"])}
    _, record = solve(Match(by="state_bytes", solve=["window"], tolerance=0), **arms)["sliding"]
    assert record["solved"] == {"window": LENGTH + 1}


def test_mlp_is_set_as_a_multiple_of_the_width() -> None:
    tree, record = solve(Match(by="parameters", to=90_000, solve=["mlp"]), a=config("linear"))["a"]
    assert abs(record["deviation"]) < 0.003  # the hidden width is free
    assert record["solved"] == {"mlp": tree["model"]["network"]["mlp"]}
    assert (record["solved"]["mlp"] * 64).is_integer()


def test_what_cannot_be_matched_is_refused() -> None:
    arms = {"sliding": config(LAYERS["sliding"]), "softmax": config(LAYERS["softmax"])}
    knobs = ["heads", "window", "mlp", "dim"]
    with pytest.raises(SpecError) as caught:
        solve(Match(by="state_bytes", solve=knobs, tolerance=0.01), **arms)
    assert str(caught.value) == (
        "softmax: 8,208 state_bytes wanted (of sliding), not 66,576; heads: changes nothing; "
        "window: none of its layers has it; mlp: changes nothing; "
        "dim: nearest 8,336 at 8 (+1.6%); tolerance 1%; give another solve, match by another "
        "figure, or a larger tolerance"
    )


def test_faults_of_a_match() -> None:
    two = {"a": config("linear"), "b": config("sliding")}
    for fields, message in (
        ({"solve": ["hads"]}, "solve: no arm has such a knob, 'hads'; did you mean 'heads'"),
        ({"solve": []}, "solve: needs at least one"),
        ({"to": "c"}, "to: no arm 'c'; known: a, b"),
        ({"to": {"layer": "c"}}, "to: no arm 'layer: c'; known: a, b"),
        ({"to": 0}, "to: must be positive, got 0"),
        ({"tolerance": 1.5}, "tolerance: must be at least 0 and below 1"),
    ):
        with pytest.raises(SpecError, match=message):
            solve(Match.from_fields({"by": "parameters", **fields}), **two)
    arms = {arm: {"size": arm, "layer": "x"} for arm in two}
    with pytest.raises(SpecError, match=r"to: the arms of layer: x differ in flops \(a; b\)"):
        match_models(Match(by="flops", to={"layer": "x"}), two, arms)


@pytest.mark.parametrize("builds", [1, 8, 24, "divisors"])
@pytest.mark.parametrize("rises", [True, False])
def test_search_finds_the_nearest(builds: Any, rises: bool) -> None:
    """As a scan of all values does."""

    def figure(v: int) -> float | None:
        if v < 1 or (192 % v if builds == "divisors" else v % builds):
            return None
        return 40 + v * v if rises else 1e6 / v

    scan = [f for f in map(figure, range(1, 40_000)) if f is not None]
    for start in (48, 192, 3):
        for target in (30, 700, 5_000, 12_345, 90_000, 2_000_000):
            found = search_knob(figure, start, target).values()
            best = min(abs(f - target) for f in found if f is not None)
            assert best == min(abs(f - target) for f in scan), (start, target)
            assert builds != 1 or len(found) < 30
