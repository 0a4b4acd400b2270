"""Distillation: its loss, its steps, and that a run trains the memory and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layerzoo import SpecError, build
from layerzoo.cli import main
from layerzoo.data.task import IGNORE
from layerzoo.hf import distil
from layerzoo.hf.distil import Distil
from layerzoo.hf.losses import kl_from_hidden
from layerzoo.layer import StateBytes
from layerzoo.model.language_model import unpack


class Block(nn.Module):
    """Full attention, or a window with the same projections beside a memory."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.full = build("softmax", dim=dim, heads=2)
        self.near: Any = build("sliding", dim=dim, heads=2, window=4)
        for name in ("q", "k", "v", "out"):
            setattr(self.near, name, getattr(self.full, name))
        self.memory = build("linear", dim=dim, heads=2)
        self.scales = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x: Tensor, state: Any, how: dict[str, Any]) -> tuple[Tensor, Any]:
        full, near, memory = state or (None, None, None)
        if how["mode"] == "full":
            y, full = self.full(x, full)
            return x + y, (full, None, None)
        y, near = self.near(x, near)
        y = y * (torch.rand(len(y), 1, 1) >= how["drop"])
        o, memory = self.memory(x, memory)
        return x + y + self.scales * o, (None, near, memory)


class Tiny(nn.Module):
    """A stand-in for a converted model."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=256, window=4)
        self.embedding = nn.Embedding(256, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.out = nn.Linear(8, 256, bias=False)
        self.how: dict[str, Any] = {"mode": "full", "drop": 0.0}
        self.seen: list[dict[str, Any]] = []
        self.checkpoint = False

    def hidden(
        self, tokens: Tensor, state: Any = None, documents: Any = None, trace: Any = None
    ) -> tuple[Tensor, Any]:
        if documents is not None:
            rows, where = unpack(tokens, documents)
            return self.hidden(rows)[0][where], None
        windows = [block.near.config.window for block in self.blocks]
        self.seen.append({**self.how, "tokens": tokens.shape[1], "windows": windows})
        x, new = self.embedding(tokens), []
        for n, block in enumerate(self.blocks):

            def run(x: Tensor, state: Any, block: nn.Module = block) -> Any:
                return block(x, state, self.how)  # the mode of when it runs, in a backward too

            before = None if state is None else state[n]
            x, s = (
                checkpoint(run, x, before, use_reentrant=False)
                if self.checkpoint
                else run(x, before)
            )
            new.append(s)
            if trace is not None:
                trace.append(x)
        return F.layer_norm(x, (8,)), new

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)

    def get_output_embeddings(self) -> nn.Linear:
        return self.out

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.named_parameters() if "memory" in n or "scales" in n)

    def save_pretrained(self, path: Path) -> None:
        path.mkdir()
        torch.save(self.state_dict(), path / "weights")

    def cautions(self, T: int) -> list[str]:
        return []

    def state_bytes(self, T: int) -> StateBytes:
        return StateBytes(T)

    def flops_per_token(self, T: int) -> float:
        return 1.0

    def choices(self) -> dict[str, list[str]]:
        return {}

    def forget_choices(self) -> None:
        pass


@contextmanager
def mode(model: Tiny, name: str) -> Iterator[None]:
    before, model.how = model.how, {**model.how, "mode": name}
    yield
    model.how = before


@contextmanager
def vary(
    model: Tiny, *, window: int | None, sinks: int | None, mini_batch: int | None, drop: float
) -> Iterator[None]:
    before, model.how = model.how, {**model.how, "drop": drop, "varied": (sinks, mini_batch)}
    layers: list[Any] = [block.near for block in model.blocks]
    configs = [layer.config for layer in layers]
    for layer in layers:
        layer.config = dataclasses.replace(layer.config, window=window or layer.config.window)
    yield
    model.how = before
    for layer, config in zip(layers, configs, strict=True):
        layer.config = config


def tiny(path: str, dtype: torch.dtype) -> Tiny:
    if not Path(path).is_dir():
        raise SpecError(f"{path}: no such folder")
    torch.manual_seed(7)
    return Tiny().to(dtype)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distil.modes, "mode", mode)
    monkeypatch.setattr(distil.modes, "vary", vary)
    monkeypatch.setattr(distil, "load", tiny)
    monkeypatch.chdir(tmp_path)
    Path("converted").mkdir()


# The loss


def plain(h: Tensor, g: Tensor, labels: Tensor, W: Tensor, kl: float, ce: float, t: float) -> Any:
    p, q = ((x @ W.T / t).softmax(-1) for x in (h, g))
    divergence = (q * (q / p).log()).sum(-1).mean()
    entropy = F.cross_entropy(h @ W.T, labels, ignore_index=IGNORE)
    return kl * divergence + ce * entropy, divergence, entropy


@pytest.mark.parametrize(("kl", "ce", "t"), [(1.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.7, 0.3, 2.0)])
def test_the_loss_is_the_formula(kl: float, ce: float, t: float) -> None:
    h, g, W = (torch.randn(n, 5, dtype=torch.float64) for n in (7, 7, 11))
    h.requires_grad_()
    labels = torch.randint(11, (7,))
    labels[2] = labels[6] = IGNORE
    got = kl_from_hidden(h, g, labels, W, kl=kl, ce=ce, temperature=t, piece=3)
    want = plain(h, g, labels, W, kl, ce, t)
    torch.testing.assert_close(tuple(got), want)
    torch.testing.assert_close(*(torch.autograd.grad(x[0] * 3, h)[0] for x in (got, want)))
    assert torch.autograd.gradcheck(
        lambda h: kl_from_hidden(h, g, labels, W, kl=kl, ce=ce, temperature=t, piece=4)[0], (h,)
    )
    assert not got.kl.requires_grad and not got.ce.requires_grad
    nothing = kl_from_hidden(h[:0], g[:0], labels[:0], W, kl=kl, ce=ce)
    assert [x.item() for x in nothing] == [0, 0, 0]
    nothing.loss.backward()
    assert h.grad is not None and not h.grad.any()


def test_the_loss_is_in_float32_under_autocast() -> None:
    h, g, W = (torch.randn(9, 16) for _ in range(3))
    h, g = h.bfloat16().requires_grad_(), g.bfloat16()
    labels = torch.randint(9, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        got = kl_from_hidden(h, g, labels, W, kl=1.0, ce=1.0)
    want = kl_from_hidden(h.float(), g.float(), labels, W, kl=1.0, ce=1.0)
    assert torch.equal(got.loss, want.loss) and got.loss.dtype == torch.float32
    assert torch.equal(*(torch.autograd.grad(x.loss, h)[0] for x in (got, want)))
    with pytest.raises(ValueError, match="freeze the head"):
        kl_from_hidden(h, g, labels, W.requires_grad_(), kl=1.0, ce=0.0)


# A step


class Trainer:
    """As much of one as a step asks for."""

    global_step = 0
    estimated_stepping_batches = 100
    datamodule = None


def module(**options: Any) -> Distil:
    lit = Distil(source="converted", **options)
    lit._trainer = Trainer()
    lit.logged = {}
    lit.log = lambda name, value, **how: lit.logged.update({name: value.item()})
    lit.log_dict = lambda values, **how: lit.logged.update(
        {n: float(x) for n, x in values.items()}
    )
    return lit


def batch(**more: Tensor) -> dict[str, Tensor]:
    tokens = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE
    return {"tokens": tokens[:, :12], "labels": labels[:, 1:].contiguous(), **more}


def step(lit: Distil, scale: float = 1.0, **more: Tensor) -> dict[str, Tensor]:
    """The gradients of a step."""
    lit.zero_grad()
    (lit.training_step(batch(**more), 0) * scale).backward()
    return {name: p.grad for name, p in lit.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_is_the_formula() -> None:
    lit = module(kl=0.5, ce=0.25, l2=2.0, tokens="past_window")
    grads = step(lit, scale=0.5)  # as of two that are accumulated
    assert {name for name, p in lit.named_parameters() if p.requires_grad} == grads.keys()
    model, data, late = lit.model, batch(), (slice(None), slice(4, None))
    outputs, goals = [], []
    with mode(model, "full"), torch.no_grad():
        g = model.hidden(data["tokens"], trace=goals)[0][late].flatten(0, 1)
    with mode(model, "memory"):
        h = model.hidden(data["tokens"], trace=outputs)[0][late].flatten(0, 1)
    labels, W = data["labels"][late].flatten(), model.out.weight
    loss, kl, ce = plain(h, g, labels, W, 0.5, 0.25, 1.0)
    pairs = [(x[late], y[late]) for x, y in zip(outputs, goals, strict=True)]
    l2 = torch.stack([((x - y).norm(dim=-1) / y.norm(dim=-1)) ** 2 for x, y in pairs]).mean()
    want = {"loss/train": loss + 2 * l2, "loss/kl": kl, "loss/ce": ce, "loss/l2": l2}
    assert lit.logged == pytest.approx({n: x.item() for n, x in want.items()}, rel=1e-4)
    parameters = lit.trained()
    wanted = torch.autograd.grad(0.5 * want["loss/train"], [*parameters.values()])
    for name, grad in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-7)


def test_pieces() -> None:
    whole = module(l2=1.0, ce=1.0)
    grads = step(whole)
    for piece in (12, 100):
        one = module(l2=1.0, ce=1.0, piece=piece)
        assert same(step(one), grads) and one.logged == whole.logged
    whole, cut = (module(l2=1.0, ce=1.0, piece=piece).double() for piece in (100, 5))
    grads, others = step(whole), step(cut)
    assert cut.logged == pytest.approx(whole.logged, rel=1e-9), "the state goes on"
    assert [s["tokens"] for s in cut.model.seen] == [5, 5, 5, 5, 2, 2]
    assert others.keys() == grads.keys() and not same(others, grads), "no gradient crosses"
    late = "model.blocks.1.scales"  # nothing of the past depends on it
    torch.testing.assert_close(others[late], grads[late])


def test_a_checkpointed_model_runs_again_as_it_ran() -> None:
    options = {"windows": [2], "sinks": [1], "mini_batches": [3]}
    kept, again = module(**options), module(**options, checkpoint=True)
    assert same(step(kept), step(again)) and again.model.checkpoint
    (teacher, student) = again.model.seen
    assert (teacher["mode"], student["mode"]) == ("full", "memory")
    assert (student["windows"], student["varied"]) == ([2, 2], (1, 3))
    assert teacher["windows"] == [4, 4]


def test_rows_go_without_their_window() -> None:
    lit = module(window_dropout=1.0)
    step(lit)
    lit.labelled(batch())
    how = [("full", 0.0), ("memory", 1.0), ("memory", 0.0)]
    assert [(s["mode"], s["drop"]) for s in lit.model.seen] == how


def test_draws_are_of_the_seed_and_the_step() -> None:
    options: dict[str, Any] = {"windows": [2, 3], "mini_batches": [1, 2]}
    lit, other = module(**options), module(**options, seed=1)
    drawn = []
    for n in range(20):
        lit.trainer.global_step = other.trainer.global_step = n
        drawn.append((lit.draw(), other.draw()))
    assert all(d["window"] in (2, 3) for d, _ in drawn)
    assert {(d["window"], d["mini_batch"]) for d, _ in drawn} == {
        (w, m) for w in (2, 3) for m in (1, 2)
    }
    assert all(d["sinks"] is None for d, _ in drawn)
    assert [a for a, _ in drawn] != [b for _, b in drawn]
    again = module(**options)  # as after an interruption
    again.trainer.global_step = 13
    assert again.draw() == drawn[13][0]


def test_positions_past_the_window() -> None:
    lit = module(tokens="past_window")
    counted = lit.counted(batch(), None)
    assert counted.tolist() == [[False] * 4 + [True] * 8] * 2
    assert lit.counted(batch(), 10).sum() == 4
    documents = torch.tensor([[0] * 6 + [1] * 6, [2] * 12])
    counted = lit.counted(batch(documents=documents), None)
    assert counted.tolist() == [([False] * 4 + [True] * 2) * 2, [False] * 4 + [True] * 8]
    assert module(tokens="all").counted(batch(), None).all()
    step(lit, documents=documents)
    assert lit.logged["loss/kl"] > 0
    for options, name in (({"piece": 5}, "piece"), ({"l2": 1.0}, "l2")):
        with pytest.raises(SpecError, match=f"model.{name}: cannot be with documents"):
            step(module(**options), documents=documents)


def test_scales_learn_faster() -> None:
    lit = module(gate_lr=5.0, lr=0.01, weight_decay=0.3)
    groups = lit.configure_optimizers()["optimizer"].param_groups
    names = {p: n for n, p in lit.named_parameters()}
    fast = [names[p] for g in groups if g["initial_lr"] == 0.05 for p in g["params"]]
    slow = [names[p] for g in groups if g["initial_lr"] == 0.01 for p in g["params"]]
    assert fast == ["model.blocks.0.scales", "model.blocks.1.scales"]
    assert sorted(fast + slow) == sorted(lit.trained())
    decayed = {names[p] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed and all("memory" in name and name.endswith("weight") for name in decayed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": -1.0}, "model.kl: must be in"),
        ({"kl": 0.0}, "nothing to learn"),
        ({"window_dropout": 1.5}, "model.window_dropout: must be in"),
        ({"piece": 0}, "model.piece: must be in"),
        ({"windows": []}, "model.windows: expected numbers from 1 on"),
        ({"windows": [0]}, "model.windows: expected numbers from 1 on"),
        ({"sinks": [-1]}, "model.sinks: expected numbers from 0 on"),
        ({"source": "nowhere"}, "model.source: nowhere: no such folder"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Distil(**{"source": "converted", **options})


def test_only_the_memory_may_train(monkeypatch: pytest.MonkeyPatch) -> None:
    lit = module()
    lit.on_fit_start()
    lit.model.out.weight.requires_grad_()
    with pytest.raises(SpecError, match=r"model.out.weight needs a gradient"):
        lit.on_fit_start()
    lit = module(tokens="past_window", windows=[2, 6])
    for length in (7, 6):
        lit.trainer.datamodule = types.SimpleNamespace(length=length)
        if length == 7:
            lit.on_fit_start()
    with pytest.raises(SpecError, match="no token of 6 is past a window of 6"):
        lit.on_fit_start()
    monkeypatch.setattr(Tiny, "memory_parameters", lambda model: iter(()))
    with pytest.raises(SpecError, match="converted has no memory to train"):
        module()


# Runs

OPTIONS = [
    *("--data.tokenizer", "null", "--data.files", "[text]", "--data.length", "16"),
    *("--data.val_samples", "4", "--data.test_samples", "4", "--data.train_samples", "8"),
    *("--data.batch_size", "2", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--model.windows", "[2, 4]"),
    *("--model.window_dropout", "0.5", "--model.piece", "10", "--model.lr", "0.01"),
    *("--trainer.max_steps", "6", "--trainer.val_check_interval", "3"),
    *("--trainer.callbacks", "layerzoo.checkpoints.Checkpoints", "--trainer.callbacks.steps", "3"),
]


def run(command: str, folder: str, *options: str) -> Path:
    name = "--trainer.logger.init_args."
    where = [f"{name}save_dir", folder, f"{name}name", "", f"{name}version", ""]
    assert main([command, *options, *where]) == 0
    return Path(folder)


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text").write_text("What is in a name? " * 99)
    Path("converted/tokenizer.json").write_text("{}")
    first = run("fit", "first", "--config", "distill", *OPTIONS)
    out = capsys.readouterr().out
    assert "model: first/model" in out and "loss/held_out: " in out
    before, after = tiny("converted", torch.float32), Tiny()
    after.load_state_dict(torch.load(first / "model/weights"))
    assert (first / "model/tokenizer.json").is_file()
    memory = {name for name, _ in before.memory_parameters()}
    for name, p in after.state_dict().items():
        assert torch.equal(p, before.state_dict()[name]) == (name not in memory), name
    events = EventAccumulator(str(first), size_guidance={"scalars": 0}).Reload()
    assert {"loss/train", "loss/kl", "loss/ce", "loss/held_out"} <= {*events.Tags()["scalars"]}
    kl = [event.value for event in events.Scalars("loss/kl")]
    assert len(kl) == 6 and all(math.isfinite(x) for x in kl)
    last = torch.load(first / "checkpoints/step=6.ckpt", weights_only=True)
    assert last["state_dict"].keys() == {f"model.{name}" for name in memory}

    # What killed it is forgotten: it is the run that it would have been.
    saved = ("--config", str(first / "config.yaml"))
    assert yaml.safe_load(Path(saved[1]).read_text())["module"] == "layerzoo.hf.distil.Distil"
    again = run("fit", "again", *saved, "--ckpt_path", str(first / "checkpoints/step=3.ckpt"))
    end = torch.load(again / "checkpoints/step=6.ckpt", weights_only=True)
    for name, weight in last["state_dict"].items():
        assert torch.equal(weight, end["state_dict"][name]), name

    checkpoint = ("--ckpt_path", str(first / "checkpoints/step=6.ckpt"))
    run("validate", "validated", *saved, *checkpoint)
    later = EventAccumulator("validated", size_guidance={"scalars": 0}).Reload()
    held_out = [event.value for event in events.Scalars("loss/held_out")]
    assert [event.value for event in later.Scalars("loss/held_out")] == held_out[1:]
    assert held_out[1] != held_out[0]
    capsys.readouterr()
    assert main(["fit", *saved, *checkpoint, "--model.kl", "2"]) == 2
    assert (
        "model.kl: 2.0, but the checkpoint to resume was trained with 1" in capsys.readouterr().err
    )
    assert main(["test", "--config", "mqar", *checkpoint]) == 2
    assert "is no option of layerzoo.lit.LitModel" in capsys.readouterr().err
    assert main(["generate", checkpoint[1], "--prompt", "a"]) == 2
    assert "is not of a language model" in capsys.readouterr().err
    lit, other = module(), {**last, "state_dict": {"model.blocks.0.scales": torch.zeros(8)}}
    with pytest.raises(SpecError, match=r"is not what it is in model\.source"):
        lit.on_load_checkpoint(other)


def test_a_memory_goes_on_in_the_model_that_it_began_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("text").write_text("What is in a name? " * 99)
    for name in ("config.json", "model.safetensors"):
        Path("converted", name).write_text(f"what {name} holds")
    first = run("fit", "first", "--config", "distill", *OPTIONS)
    record = json.loads((first / "record.json").read_text())
    assert [*record["digest"]] == ["data.files", "model.source"]
    saved = ("--config", str(first / "config.yaml"))
    resume = ("--ckpt_path", str(first / "checkpoints/step=3.ckpt"))
    shutil.copytree("converted", "moved")
    run("fit", "again", *saved, *resume, "--model.source", "moved")
    Path("converted/model.safetensors").write_text("other weights")
    capsys.readouterr()
    assert main(["fit", *saved, *resume]) == 2
    error = capsys.readouterr().err
    assert "model.source: its contents are others (" in error and "or train anew" in error
    for command in ("validate", "test"):
        where = ("--trainer.logger.init_args.save_dir", command)
        assert main([command, *saved, *resume, *where]) == 2
        assert "its memory was trained in another model (" in capsys.readouterr().err
