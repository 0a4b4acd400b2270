"""What `layerzoo describe` counts: sums of the layers' own figures, measured ones, and a claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layerzoo import SpecError, build, list_layers
from layerzoo.cli import main
from layerzoo.layer import StateBytes
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.registry import get_layer
from layerzoo.tools.describe.command import figures, read_network
from layerzoo.tools.describe.costs import (
    PartCost,
    attending,
    cost,
    full_attention,
    layer_parts,
    on_meta,
    other_parts,
    state_bytes,
    title,
)

T = 40
SLIDING = {"name": "sliding", "heads": 4, "kv_heads": 2, "window": 6, "sinks": 2}
PARALLEL = {"name": "parallel", "children": [SLIDING, {"name": "linear", "heads": 2}]}
LACT = {"name": "lact", "heads": 2, "mini_batch": 8, "optimiser": "muon"}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"layers": ["linear", SLIDING], "conv": 0},
    "tied": {"layers": [PARALLEL], "tie": True, "mlp": 2.0},
    "persistent": {"layers": [PARALLEL, "softmax"], "persistent": 3, "mlp": 1.0},
    "exceptions": {"layers": [LACT], "overrides": {-1: {"mini_batch": 4}, 0: "softmax"}},
}
CONFIG = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())


def config_of(fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 31, "dim": 16, "depth": 3, **fields})


@CONFIG
def test_parts_sum_to_the_model(fields: dict[str, Any]) -> None:
    config = config_of(fields)
    model, meta = LanguageModel(config), on_meta(config)
    assert all(p.is_meta for p in meta.parameters())
    total = sum([*layer_parts(meta, T), *other_parts(meta, T).values()], PartCost())
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.flops == pytest.approx(model.flops_per_token(T), rel=1e-9)
    assert StateBytes(total.memory, total.buffers) == model.state_bytes(T)
    assert total == figures(config, T)["total"]
    found = cost(meta, T)
    assert found[1:3] == model.state_bytes(T)
    read = T + config.persistent
    layers = [block.layer for block in model.each_block()]
    want = [
        sum(x.rule_flops(read) for x in layers),
        sum(x.flops_per_token(read) for x in layers),
    ]
    assert [found.mean_rule, found.mean] == pytest.approx([w * read / T for w in want])
    assert sum(part.rule for part in layer_parts(meta, T)) == pytest.approx(found.mean_rule)


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("length", [1, 5, T])
def test_the_last_token_costs_what_a_step_is_measured_to_cost(
    length: int, persistent: int
) -> None:
    layers = [PARALLEL, "softmax"]
    model = LanguageModel(
        config_of({"layers": layers, "persistent": persistent}), impl="recurrent"
    )
    x = torch.randint(31, (1, length))
    with torch.no_grad():
        state = model.hidden(x[:, :-1])[1] if length > 1 else model.init_state(1)
        with FlopCounterMode(display=False) as counter:
            model.hidden(x[:, -1:], state)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "conv" not in str(op))
    found = cost(model, length)
    assert found.last == pytest.approx(products, rel=1e-9)
    linear = sum(
        2 * m.weight.numel()
        for block in model.each_block()
        for m in block.layer.modules()
        if isinstance(m, torch.nn.Linear)
    )
    assert found.last - found.last_rule == pytest.approx(linear)


@CONFIG
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_state(fields: dict[str, Any], dtype: str) -> None:
    config = config_of(fields)
    model = LanguageModel(config).to(getattr(torch, dtype))
    with torch.no_grad():
        leaves = tree_leaves(model.hidden(torch.randint(31, (1, T)))[1])
    total = figures(config, T, dtype)["total"]
    assert total.memory + total.buffers == sum(leaf.nbytes for leaf in leaves)


def test_a_composition_of_unknown_state_keeps_its_own_figure() -> None:
    layer: Any = build(PARALLEL, dim=16)
    assert state_bytes(layer, T, 2).total < layer.state_bytes(T).total
    layer.state_bytes = lambda T: StateBytes(1000, 7)
    assert state_bytes(layer, T, 2) == (1000, 7)


@pytest.mark.parametrize("name", list_layers())
def test_every_layer_is_described(name: str) -> None:
    described = 0
    for case in get_layer(name).cases:
        spec = {"name": name, **case}
        try:
            build(spec, dim=24)
        except SpecError:
            continue  # a case for another width
        found = figures(config_of({"layers": [spec], "dim": 24}), T)
        ours, full = found["lengths"][-1]
        assert ours.T == full.T == 2**20 and ours.mean > ours.mean_rule > 0 < full.last_rule
        assert title(spec).startswith(name)
        described += 1
    assert described


def test_full_attention_is_as_wide_as_the_layer() -> None:
    heads = {"heads": 4, "kv_heads": 2}
    assert attending(SLIDING).items() >= {"name": "softmax", **heads, "rotary": 10000.0}.items()
    memory = {"name": "linear", "heads": 3, "key_dim": 5, "value_dim": 7}
    widths = {"key_dim": 5, "value_dim": 7}
    assert attending(memory) == {"name": "softmax", "heads": 3, **widths, "rotary": None}
    wide = {**SLIDING, "key_dim": 6, "qk_norm": "l2", "out_gate": "silu", "rotary": None}
    nested = {"name": "parallel", "children": [memory, {"name": "parallel", "children": [wide]}]}
    kept = {k: wide[k] for k in wide if k not in ("name", "window", "sinks")}
    assert attending(nested) == build("softmax", dim=24, **kept).spec()
    assert title(nested) == "parallel(linear, parallel(sliding))"
    config = config_of(
        {"layers": {"a": nested, "b": "softmax"}, "pattern": "a b", "overrides": {0: SLIDING}}
    )
    full = on_meta(full_attention(config))
    assert [block.layer.name for block in full.each_block()] == ["softmax"] * 3
    assert [block.layer.heads for block in full.each_block()] == [4, 4, 4]
    assert full_attention(full.config) == full.config


@pytest.mark.parametrize("window, sinks", [(1, 0), (1, 3), (4, 0), (4, 2), (9, 20)])
def test_the_flops_of_a_window_are_the_sum_over_its_tokens(window: int, sinks: int) -> None:
    layer = build("sliding", dim=16, heads=2, window=window, sinks=sinks)
    for length in (*range(1, 40), 200):
        seen = sum(sum(i - j < window or j < sinks for j in range(i + 1)) for i in range(length))
        assert layer.rule_flops(length) == pytest.approx(2 * 4 * 8 * seen / length)


def test_the_claim_of_allmem() -> None:
    """128k tokens, window 8k, Qwen3-1.7B: the paper says about 1/9 of full attention's FLOPs."""
    config, length = read_network("allmem-qwen3-1.7b", {})
    assert length == 4096, "a config without data"
    found = figures(config, 131072, "bfloat16")
    (ours, full), *_ = [pair for pair in found["lengths"] if pair[0].T == 131072]
    D, H, G, K, N, w, L = 2048, 16, 8, 128, 131072, 8192, 28
    fast = 4 * 3 * 512 * 768  # numbers of 4 heads' three matrices
    attend = 4 * H * K  # FLOPs a token seen
    projections, own = 2 * D * 2 * (H + G) * K, 2 * D * 4 * D  # attention's, the memory's
    memory = 6 * fast + 2 * fast / 3  # read, write forward, outer products; errors of one matrix
    gates = 2 * D * 2 * 4  # rate and momentum, one a head
    window = attend * (w * (w + 1) / 2 + (N - w) * w) / N
    assert full.mean_rule == L * attend * (N + 1) / 2
    assert full.last_rule == L * attend * N
    assert full.mean - full.mean_rule == full.last - full.last_rule == L * projections
    assert ours.mean_rule == pytest.approx(L * (window + memory), rel=1e-12)
    assert ours.last_rule == pytest.approx(L * (attend * w + memory), rel=1e-9)
    around = L * (projections + own + gates)
    assert ours.mean - ours.mean_rule == pytest.approx(around, rel=1e-9)
    assert ours.last - ours.last_rule == pytest.approx(around, rel=1e-9)
    # How many times more full attention costs: never 9 as the mean, even without any memory.
    ratios = {
        "mean, rules": full.mean_rule / ours.mean_rule,
        "mean": full.mean / ours.mean,
        "last, rules": full.last_rule / ours.last_rule,
        "last": full.last / ours.last,
        "last, projections shared": full.last / (ours.last - around + L * (projections + gates)),
        "mean, window alone": full.mean_rule / (L * window),
        "last, window alone": full.last_rule / (L * attend * w),
    }
    want = (5.57, 3.62, 10.89, 6.99, 8.88, 8.26, 16.0)
    assert list(ratios.values()) == pytest.approx(want, abs=0.005), ratios
    # bfloat16 caches; float32 fast weights, with as much again for pending writes and momentum.
    cache = 2 * 2 * G * K
    assert full.memory == L * cache * N
    assert ours.memory == L * (cache * (w - 1) + 4 * fast)
    assert full.state / ours.state == pytest.approx(5.95, abs=0.005)
    assert full.state / ours.memory == pytest.approx(10.24, abs=0.005)
    # Qwen3-1.7B has 1.72 billion parameters, and the fast weights are 6 to 10% of them.
    parameters = found["total"].parameters - L * (own + gates) / 2
    bare = sum(p.numel() for p in on_meta(full_attention(config)).parameters())
    assert bare == pytest.approx(1.72e9, rel=2e-3)
    assert 0.06 < parameters / bare - 1 < 0.10


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png"))
    change = ("--model.network.depth", "3", "--model.network.overrides={-1: {name: softmax}}")
    assert main(["describe", "--config", "mqar", *change, *files]) == 0
    out = capsys.readouterr().out
    assert "mqar: depth 3, dim 64, vocabulary 64" in out and "At T = 64:" in out
    assert "0-1, each  parallel(sliding, gated_delta)" in out and "2          softmax" in out
    assert "2 a multiply-add" in out and "in float32" in out and "1,048,576" in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["total"]["parameters"] == sum(
        part["figures"]["parameters"] for part in found["blocks"]
    ) + sum(part["parameters"] for part in found["others"].values())
    assert f"{found['total']['parameters']:,}" in out
    assert [pair["this"]["T"] for pair in found["lengths"]] == [64, *(2**n for n in range(10, 21))]
    assert found["blocks"][2]["spec"] == {"name": "softmax"}
    assert (tmp_path / "d.png").stat().st_size > 10000


def test_a_network_alone_or_over_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    network = "{vocab_size: 7, dim: 8, depth: 1, layers: [{name: linear, heads: 2}]}"
    assert main(["describe", "--network", network, "--length", "300", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "this model: depth 1, dim 8, vocabulary 7" in out and "At T = 300:" in out
    assert "in bfloat16" in out
    config, length = read_network(
        "mqar", {"model.network.layers": ["softmax"], "model.network.dim": 32}
    )
    assert (config.dim, config.layers, config.vocab_size, length) == (32, ("softmax",), 64, 64)
    assert read_network(
        "mqar", {"model.network.layers": {"a": "softmax"}, "model.network.pattern": "a"}
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "describe: needs --config NAME or --network '{vocab_size: 256, ..}'"),
        (["--config", "mqarr"], "did you mean 'mqar'?"),
        (["--config", "mqar", "--length", "0"], "--length: must be at least 1, got 0"),
        (["--config", "mqar", "--length", "x"], "describe: --length: invalid int value: 'x'"),
        (["--config", "mqar", "--dtype", "int8"], "describe: --dtype: no 'int8'; known: "),
        (["--config", "mqar", "--jsn", "x"], "--jsn: no such option; did you mean '--json'?"),
        (["--config", "mqar", "stray"], "stray: no such option; "),
        (["--config", "mqar", "--model.network.dim"], "--model.network.dim: expected a value"),
        (["--config", "mqar", "--model.network.dimm", "3"], "model.network: unknown field 'dimm'"),
        (["--config", "mqar", "--model.network.dim", "[1"], "--model.network.dim: is not YAML: "),
        (["--network", "[1]"], "--network: expected fields, {vocab_size: 256, ..}, got [1]"),
        (["--network", "{dim: 3}"], "model.network: vocab_size: missing"),
        (
            ["--network", "{vocab_size: 3, dim: 6, layers: [linear]}"],
            "model.network: layers[0]: linear: heads (or give",
        ),
        (["--config", "mqar", "--plot", "x.txt"], "--plot x.txt: cannot draw this kind"),
        (["--config", "mqar", "--json", "/no/x"], "--json /no/x: cannot be written: No such file"),
        (["--config", "mqar", "--model.network.dim", "${x}"], "model.network: "),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["describe", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("layerzoo: error: ") and message in line
