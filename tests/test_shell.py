"""The shell around every rule: one set of fields, and what each of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from layerzoo import build, get_layer, list_layers
from layerzoo.attention.common import Attention
from layerzoo.memory import Memory
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.nn import l2_normalise
from layerzoo.shell import Headed, Shell
from layerzoo.spec import SpecError
from layerzoo.train.lit import LitModel, load_model

HEADED = [name for name in list_layers() if issubclass(get_layer(name), Headed)]
MEMORIES = [name for name in HEADED if issubclass(get_layer(name), Memory)]
ATTENTION = [name for name in HEADED if issubclass(get_layer(name), Attention)]
DIM = 24


def x(T: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, DIM, dtype=dtype, generator=torch.Generator().manual_seed(1))


def made(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return build(name, dim=DIM, **fields).double()


def test_every_memory_and_attention_has_the_shell() -> None:
    assert {"delta", "ttt_mlp", "mamba2"} <= {*MEMORIES} and {"softmax", "latent"} <= {*ATTENTION}
    kinds = {name for name in list_layers() if get_layer(name).kind in ("memory", "attention")}
    assert kinds == {*HEADED}
    shared = {field.name for field in Shell.fields()}
    for name in HEADED:
        fields = {field.name for field in get_layer(name).Config.fields()}
        assert shared < fields
        assert ("kv_heads" in fields, "key_heads" in fields) == (
            name in ATTENTION,
            name in MEMORIES,
        )


def test_defaults_differ_by_kind_alone() -> None:
    for name in HEADED:
        found = get_layer(name).Config().to_fields()
        memory = name in MEMORIES
        assert (found["heads"], found["out_gate"], found["key_bias"]) == (4, "none", False)
        assert found["out_norm"] == ("rms" if memory else "none")
        # Latent attention has norms of its latents; the gates of `forgetting` are its positions.
        own = {"latent": "none"}
        assert found["qk_norm"] == own.get(name, "l2" if memory else "rms")
        assert found["rotary"] == (None if memory or name == "forgetting" else 10000.0)


@pytest.mark.parametrize("name", ["softmax", "sliding", "forgetting", "differential"])
def test_l2_starts_as_rms_and_its_temperature_is_learned(name: str) -> None:
    rms, l2 = (made(name, heads=2, qk_norm=norm) for norm in ("rms", "l2"))
    l2.load_state_dict(
        {k: v for k, v in rms.state_dict().items() if k in l2.state_dict()}, strict=False
    )
    torch.testing.assert_close(l2(x())[0], rms(x())[0], atol=1e-5, rtol=0)  # their eps differ
    l2(x())[0].square().sum().backward()
    assert l2.temperature.grad.abs().min() > 0
    found, K = l2.project(x(), l2.init_state(2)), l2.key_dim
    for name, length in (("q", K), ("k", 1)):
        norms = found[name].norm(dim=-1) / length
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MEMORIES)
def test_grouped_keys_are_repeated_for_their_values(name: str) -> None:
    """Equal to as many key heads as value heads, of equal weights."""
    widths = {"heads": 4, "key_dim": 6, "value_dim": 6}
    case = get_layer(name).cases[0] | widths
    grouped, full = made(name, **case, key_heads=2), made(name, **case)
    weights = dict(grouped.state_dict())
    for part in ("q.weight", "k.weight"):
        weights[part] = weights[part].unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    y, state = grouped(x())
    torch.testing.assert_close((y, state), full(x()))
    assert grouped.q.out_features == 12 and grouped.state_bytes(9) == full.state_bytes(9)


@pytest.mark.parametrize("name", ["linear", "gated_delta", "mesa", "ttt_linear"])
def test_a_memory_with_positions_knows_how_far_back_a_key_is(name: str) -> None:
    """It reads a state, as a rotary linear attention does: q and k turned by their positions."""
    layer, plain = made(name, heads=2, rotary=50.0), made(name, heads=2)
    assert not torch.allclose(layer(x())[0], plain(x())[0], atol=1e-3)
    q, write = layer.project(x())
    q0, write0 = plain.project(x())
    turned = layer.config.rotate(torch.stack((q0, write0.k)).flatten(0, 1), 0)
    torch.testing.assert_close(torch.cat((q, write.k)), turned)
    _, state = layer(x(7))
    assert int(state["position"]) == 7
    assert layer.state_bytes(7).buffers == plain.state_bytes(7).buffers + 8
    later, _ = layer.project(x(), 7)
    torch.testing.assert_close(later, layer.config.rotate(q0, 7))


def test_the_norms_do_what_they_say() -> None:
    layer = made("softmax", heads=2, qk_norm="rms", rotary=None)
    found = layer.project(x(), layer.init_state(2))
    assert torch.allclose(
        found["k"].square().mean(-1), torch.ones((), dtype=torch.float64), atol=1e-3
    )
    layer = made("linear", heads=2)
    q, write = layer.project(x())
    torch.testing.assert_close(q, l2_normalise(layer.q(x()).unflatten(-1, (2, -1))))
    assert torch.allclose(write.k.norm(dim=-1), torch.ones((), dtype=torch.float64), atol=1e-4)
    layer = made("softmax", heads=2, out_norm="rms", out_gate="silu")
    o = torch.randn(2, 5, 2, 12, dtype=torch.float64)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = layer.out(normed.flatten(-2) * torch.nn.functional.silu(layer.gate(x(5))))
    torch.testing.assert_close(layer.merge(o, x(5)), want)


SLIDING = {"name": "sliding", "heads": 2, "window": 3}
MAPS = {"name": "differential", "heads": 2}
OLD = {
    "vocab_size": 11,
    "dim": 24,
    "layers": {
        "a": {"name": "parallel", "children": [SLIDING, "gated_delta"]},
        "b": {**MAPS, "head_dim": 4, "qk_norm": True},
        "c": {"name": "softmax", "heads": 2, "out_gate": True},
        "d": "forgetting",
    },
    "pattern": "a b c d",
    "depth": 5,
    "overrides": {"2": {"name": "prefix", "children": ["delta"]}, "3": {"out_gate": True}},
}
"""A network of a checkpoint from when attention had no norm of q and k unless it was asked for."""
OFF = {"qk_norm": "none"}
THEN = {
    **OLD,
    "layers": {
        "a": {"name": "parallel", "children": [{**SLIDING, **OFF}, "gated_delta"]},
        "b": {**MAPS, "key_dim": 4, "value_dim": 8, "qk_norm": "rms"},
        "c": {"name": "softmax", "heads": 2, "out_gate": "sigmoid", **OFF},
        "d": {"name": "forgetting", **OFF},
    },
    "overrides": {2: {"name": "prefix", "children": ["delta"], **OFF}, 3: {"out_gate": "sigmoid"}},
}


def test_a_checkpoint_of_before_is_read_with_the_defaults_of_its_time(tmp_path: Path) -> None:
    config = ModelConfig.from_fields(THEN)
    lit = LitModel(network=config)
    saved = {"state_dict": lit.state_dict(), "hyper_parameters": {"network": OLD}}
    torch.save(saved, tmp_path / "old.ckpt")
    model = load_model(tmp_path / "old.ckpt")
    assert model.config.to_fields() == config.to_fields()
    tokens = torch.randint(11, (2, 9))
    torch.testing.assert_close(model(tokens), lit.model(tokens))


def test_a_checkpoint_of_today_is_read_as_it_is(tmp_path: Path) -> None:
    """Whatever becomes of a default: its specs hold all their fields."""
    config = ModelConfig(vocab_size=11, dim=24, layers=("softmax", {"name": "kda", "heads": 2}))
    lit = LitModel(network=config)
    layers = lit.hparams["network"]["layers"]
    assert layers == [block.layer.spec() for block in lit.model.each_block()]
    torch.save(
        {"state_dict": lit.state_dict(), "hyper_parameters": dict(lit.hparams)},
        tmp_path / "c.ckpt",
    )
    softmax = get_layer("softmax").Config
    before = softmax.qk_norm
    softmax.__init__.__kwdefaults__["qk_norm"] = "l2"
    try:
        assert build("softmax", dim=24).config.qk_norm == "l2"
        model = cast(LanguageModel, load_model(tmp_path / "c.ckpt"))
        assert [block.layer.spec() for block in model.each_block()] == layers
    finally:
        softmax.__init__.__kwdefaults__["qk_norm"] = before


def test_starts_are_where_the_fields_say() -> None:
    from layerzoo.nn import LogDecay

    for gate in ("softplus", "bounded"):
        layer = made(
            "gla", heads=2, decay_gate=gate, decay_rate=[0.5, 2.0], decay_step=[0.01, 0.1]
        )
        decay: LogDecay = layer.log_decay
        for p in decay.x.parameters():
            torch.nn.init.zeros_(p)
        start = -decay(x(1))
        assert 0.005 <= start.min() < start.max() <= 0.2
        one = {"decay_rate": [0.75, 0.75], "decay_step": [4.0, 4.0]}
        decay = made("gla", heads=2, decay_gate=gate, **one).log_decay
        for p in decay.x.parameters():
            torch.nn.init.zeros_(p)
        start = decay(x(1))
        torch.testing.assert_close(start, torch.full_like(start, -3.0))
    layer = made("delta", heads=2, beta_bias=-2.0, beta_max=2)
    torch.nn.init.zeros_(layer.beta.weight)
    want = 2 * torch.tensor(-2.0, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(layer.project(x(3))[1].beta, want.expand(2, 3, 2))
    layer = made("titans", heads=2, lr_bias=1.0, momentum_bias=-1.0, decay_bias=-4.0)
    gates = (layer.lr_gate, layer.momentum_gate, layer.decay_gate)
    assert [gate.x.bias.mean().item() for gate in gates] == [1.0, -1.0, -4.0]


def test_a_gate_that_cannot_start_there_is_refused() -> None:
    with pytest.raises(SpecError, match="decay_gate: bounded is above -5"):
        build("kda", dim=24, decay_gate="bounded", decay_rate=[1.0, 100.0])
    with pytest.raises(SpecError, match="decay_gate: expected one of 'softplus', got 'bounded'"):
        build("mamba2", dim=24, decay_gate="bounded")
