"""The layers of fast weights: presets at their defaults, diagnostics, cautions, checkpointing."""

from __future__ import annotations

import functools
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves

from layerzoo.data import MQAR
from layerzoo.memories.fast_weights import FastWeights
from layerzoo.memories.fast_weights.compiled import compiled_piece
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.nn import UnitLength
from layerzoo.ops import ImplError
from layerzoo.registry import build, get_layer, list_layers
from layerzoo.train.callbacks import Diagnostics
from layerzoo.train.lit import LitModel

PRESETS = [n for n in list_layers() if issubclass(get_layer(n), FastWeights)]
NAMES = "allmem fast_weights lact memora moneta titans ttt_linear ttt_mlp yaad"


def test_presets_are_these() -> None:
    assert " ".join(PRESETS) == NAMES


@pytest.mark.parametrize("T", [2048, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_stable_at_its_defaults(name: str, autocast: bool, T: int) -> None:
    """No NaN, bounded weights, no denormals, a moderate gradient; the inputs share a direction,
    which makes the gradients of a mini-batch add up."""
    layer = build(name, dim=32, heads=2)
    assert isinstance(layer, FastWeights)
    x = torch.randn(1, T, 32) + torch.randn(1, 1, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = layer(x)
    y.float().square().mean().backward()
    first = max(float(w.detach().norm()) for w in layer.weights)
    for leaf in tree_leaves(state):
        assert torch.isfinite(leaf).all()
        tiny = torch.finfo(torch.float32).tiny
        assert not ((leaf != 0) & (leaf.abs() < tiny)).any()
    assert max(float(w.detach().norm()) for w in state["weights"]) < 20 * first
    norm = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]).norm()
    assert 0 < norm < 100


@pytest.mark.parametrize("name", PRESETS)
def test_writes_lower_the_inner_loss(name: str) -> None:
    layer = build(name, dim=32, heads=2, mini_batch=8)
    found = layer.diagnose(torch.randn(2, 64, 32))
    figures = {"loss_before", "loss_after", "write_norm", "weight_norm", "retention"}
    assert found.keys() == figures
    assert found["loss_after"] < found["loss_before"]
    assert 0.9 < found["retention"] < 1.1
    assert layer.diagnose(torch.randn(2, 7, 32)) == {}  # nothing was written


def test_diagnostics_are_of_the_state() -> None:
    """One mini-batch of a linear memory: the figures follow from the weights before and after."""
    spec = {"name": "fast_weights", "network": "linear", "forgetting": "decay", "mini_batch": 4}
    layer = build(spec, dim=8, heads=1)
    assert isinstance(layer, FastWeights)
    layer.double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    _, state = layer(x)
    _, write = layer.project(x)
    k, v, W = write.k[:, :, 0], write.v[:, :, 0], state["weights"][0][:, 0]
    old = layer.weights[0].expand_as(W)
    loss: Any = lambda W: 0.5 * (k @ W - v).square().sum(-1).mean()  # noqa: E731
    want = {
        "loss_before": loss(old),
        "loss_after": loss(W),
        "write_norm": (W - old).norm(dim=(1, 2)).mean(),
        "weight_norm": W.norm(dim=(1, 2)).mean(),
        "retention": ((W * old).sum((1, 2)) / old.square().sum((1, 2))).mean(),
    }
    found = layer.diagnose(x)
    assert found == pytest.approx(
        {name: float(value.detach()) for name, value in want.items()}, rel=1e-9
    )


def test_cautions() -> None:
    (line,) = build("allmem", dim=16).cautions(64)
    assert line == (
        "allmem: a mini-batch of 512 never fills in sequences of 64 tokens, so nothing is ever "
        "written; set mini_batch to 16 or less"
    )
    window = {"name": "sliding", "window": 8}
    layer = build("parallel", dim=16, children=[window, "titans", "titans"])
    assert len(layer.cautions(15)) == 2 and layer.cautions(16) == []
    config: Any = {"layers": ["titans"], "vocab_size": 8, "dim": 16, "depth": 3}
    assert len(LanguageModel(**config).cautions(8)) == 1


def fit(tmp_path: Path, spec: Any, *callbacks: Any, **options: Any) -> Any:
    """Train on MQAR of 32 tokens, two steps; the logger's tags."""
    config = ModelConfig(layers=(spec,), vocab_size=32, dim=16, depth=2)
    trainer = Trainer(
        max_steps=2,
        limit_val_batches=2,
        val_check_interval=2,
        logger=TensorBoardLogger(str(tmp_path), name="", version=""),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        accelerator="cpu",
    )
    task = MQAR(vocab_size=32, length=32, pairs=4, batch_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(LitModel(network=config, **options), task)
    return trainer, [str(w.message) for w in caught if "mini-batch" in str(w.message)]


def test_a_mini_batch_that_never_fills_warns_once(tmp_path: Path) -> None:
    _, caught = fit(tmp_path, {"name": "titans", "heads": 2, "mini_batch": 33})
    assert len(caught) == 1 and "titans: a mini-batch of 33 never fills" in caught[0]
    _, caught = fit(tmp_path, {"name": "titans", "heads": 2, "mini_batch": 32})
    assert not caught


def test_diagnostics_reach_tensorboard(tmp_path: Path) -> None:
    children = [{"name": "sliding"}, {"name": "titans", "heads": 2, "mini_batch": 8}]
    spec = {"name": "parallel", "children": children}
    trainer, _ = fit(tmp_path, spec, Diagnostics())
    found = {name for name in trainer.logged_metrics if name.startswith("memory/")}
    assert "memory/0.1.titans/loss_after" in found and "memory/1.1.titans/retention" in found
    assert len(found) == 10
    hooks = [m for m in trainer.model.modules() if m._forward_pre_hooks]
    assert not hooks
    trainer, _ = fit(tmp_path, spec)
    assert not any(name.startswith("memory/") for name in trainer.logged_metrics)


def test_checkpoint_keeps_less_and_changes_nothing() -> None:
    config: Any = {"layers": ["ttt_mlp"], "vocab_size": 8, "dim": 32, "depth": 1}
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(**config, checkpoint=checkpoint)
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            h, _ = model.hidden(torch.arange(2048).view(2, -1) % 8)
        h.square().mean().backward()
        found.append((kept, [p.grad for p in model.parameters()]))
    (whole, want), (less, got) = found
    assert less < whole / 3
    torch.testing.assert_close(got, want)


def test_unit_length_has_two_derivatives() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    x[0] = 0
    x.requires_grad_()
    assert gradcheck(lambda x: UnitLength.apply(x, 1e-2), (x,))
    assert gradgradcheck(lambda x: UnitLength.apply(x, 1e-2), (x,))


def run_twice(layer: Any, x: Tensor) -> list[Tensor]:
    """Outputs, state and gradients of a sequence cut inside a mini-batch."""
    first, state = layer(x[:, :13])
    second, state = layer(x[:, 13:], state)
    floats = [leaf for leaf in tree_leaves(state) if leaf.is_floating_point()]
    total = sum(leaf.square().sum() for leaf in (first, second, *floats))
    assert isinstance(total, Tensor)
    layer.zero_grad()
    total.backward()
    return [first, second, *floats, *(p.grad.clone() for p in layer.parameters())]


quiet = pytest.mark.filterwarnings(  # of torch about torch
    r"ignore:The \.grad attribute of a Tensor that is not a leaf",
    "ignore:.*should not be instantiated:DeprecationWarning",
    r"ignore:.*torch\.jit\.script.*deprecated:DeprecationWarning",
)


CAPTURED = ("ttt_mlp", "ttt_linear")


@quiet
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in CAPTURED else pytest.mark.slow) for n in PRESETS],
)
def test_compiled_is_the_same(name: str, monkeypatch: Any) -> None:
    """As captured; what a backend makes of the capture is torch's own (and of titans, below)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled_piece.cache_clear()
    same_compiled(build(name, dim=8, heads=2, mini_batch=4))
    compiled_piece.cache_clear()


@quiet
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_by_torch() -> None:
    same_compiled(build("titans", dim=8, heads=2, mini_batch=4))


def same_compiled(layer: Any) -> None:
    layer.double()
    x = torch.randn(2, 25, 8, dtype=torch.float64)
    want = run_twice(layer, x)
    layer.compiled = True
    torch._dynamo.reset()
    captured = counters["stats"]["unique_graphs"]
    got = run_twice(layer, x)
    assert counters["stats"]["unique_graphs"] > captured
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@quiet
def test_compiled_without_a_compiler(monkeypatch: Any) -> None:
    layer = build("titans", dim=8, heads=2, mini_batch=4)
    layer.compiled = True

    def backend(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compiled_piece.cache_clear()
    with pytest.raises(ImplError, match=r"set compiled to false: .*No working C"):
        layer(torch.randn(1, 8, 8))
    compiled_piece.cache_clear()
