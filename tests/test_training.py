"""Training end to end through the CLI, on the CPU."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Optional, Union

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo import build
from layerzoo.cli import main
from layerzoo.data import MQAR
from layerzoo.data.task import IGNORE
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.train.lit import LitModel, load_model
from layerzoo.train.parser import TrainingParser

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def fit(folder: Path, config: str, *options: str) -> Path:
    """Train, logging to `folder`; returns the folder."""
    where = ["--trainer.logger.init_args.save_dir", str(folder)]
    where += ["--trainer.logger.init_args.name", "", "--trainer.logger.init_args.version", ""]
    assert main(["fit", "--config", config, *where, *QUIET, *options]) == 0
    return folder


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(tag)]


SMALL = [
    *("--trainer.max_steps", "12", "--trainer.val_check_interval", "6"),
    *("--data.init_args.train_samples", "80", "--data.init_args.batch_size", "8"),
    *("--data.init_args.val_samples", "16", "--model.network.dim", "32"),
    *("--trainer.callbacks.init_args.save_top_k", "-1"),
]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("small"), "mqar", *SMALL)


def test_fit_lowers_the_loss_on_real_text(tmp_path: Path, capsys) -> None:
    options = ("--trainer.max_steps", "40", "--trainer.val_check_interval", "20")
    size = ("--data.length", "64", "--data.val_samples", "32", "--model.network.dim", "32")
    before = build("gated_delta", dim=8, heads=2)
    before.impl = "recurrent"
    before(torch.randn(1, 3, 8))  # what ran before the fit is not in its record
    folder = fit(tmp_path, "text", *options, *size)
    losses = scalars(folder, "loss/held_out")
    assert losses[-1] < losses[0] < 5.6  # log 256 = 5.55 is a uniform guess
    assert scalars(folder, "loss/bits_per_byte")[-1] == pytest.approx(losses[-1] / 0.693147, 1e-4)
    assert scalars(folder, "tokens/s")[-1] > 0
    record = json.loads((folder / "record.json").read_text())
    assert record["impl"] == {"sliding_attention": ["chunked"], "delta_rule": ["chunked"]}
    checkpoint = folder / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert main(["generate", str(checkpoint), "--prompt", "def ", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_a_resumed_run_is_the_uninterrupted_run(small_run: Path, tmp_path: Path) -> None:
    # 10 batches an epoch: step 6 is inside the first one, so the data must go on there too.
    checkpoint = small_run / "checkpoints" / "epoch=0-step=6.ckpt"
    how = ("--model.checkpoint", "true")  # is not a hyperparameter
    resumed = fit(tmp_path, "mqar", *SMALL, *how, "--ckpt_path", str(checkpoint))
    whole, again = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (small_run, resumed)
    )
    assert again["global_step"] == whole["global_step"] == 12
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, again["state_dict"][name]), name


def test_patterns_and_exceptions_survive_a_run(tmp_path: Path) -> None:
    layers = "{near: {name: sliding, heads: 2, window: 4}, all: {name: linear, heads: 2}}"
    network = ("--model.network.layers", layers, "--model.network.pattern", "near all")
    network += ("--model.network.overrides", "{-1: {heads: 4}}", "--model.network.persistent", "3")
    folder = fit(tmp_path / "first", "mqar", *SMALL, *network, "--trainer.max_steps", "1")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    blocks = list(load_model(checkpoint).each_block())
    assert [(b.layer.name, b.layer.heads) for b in blocks] == [("sliding", 2), ("linear", 4)]
    resume = ("--ckpt_path", str(checkpoint), "--trainer.max_steps", "2")
    again = fit(tmp_path / "again", str(folder / "config.yaml"), *resume)
    before, after = (load_model(f / "checkpoints" / "last.ckpt") for f in (folder, again))
    assert before.config == after.config and before.persistent is not None
    assert not torch.equal(before.persistent, after.persistent)


@pytest.mark.parametrize("change", [("lr", "1e-4", "0.003"), ("network.dim", "16", "32")])
def test_training_goes_on_only_with_its_hyperparameters(
    small_run: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str, str]
) -> None:
    name, new, old = change
    checkpoint = str(small_run / "checkpoints" / "last.ckpt")
    resume = ("fit", "--config", "mqar", *SMALL, "--ckpt_path", checkpoint)
    assert main([*resume, f"--model.{name}", new]) == 2
    assert f"was trained with {old}" in capsys.readouterr().err


def test_a_batch_without_labels_does_no_harm() -> None:
    lit = LitModel(network=ModelConfig(vocab_size=64, layers=("linear",), dim=32))
    lit.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = MQAR(vocab_size=64, pairs=4).batch("train", range(2))
    batch["labels"][:] = IGNORE
    assert lit.training_step(batch, 0).item() == 0


def test_a_checkpoint_brings_its_network(small_run: Path, tmp_path: Path) -> None:
    checkpoint = str(small_run / "checkpoints" / "last.ckpt")
    where = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--ckpt_path", checkpoint]
    assert main(["test", "--config", "mqar", "--data.test_samples", "8", *where, *QUIET]) == 0
    assert main(["predict", "--config", "mqar", "--data.test_samples", "8", *where, *QUIET]) == 0
    (saved,) = tmp_path.rglob("predictions-0.pt")
    (batch,) = torch.load(saved, weights_only=True)
    assert batch["prediction"].shape == batch["label"].shape == batch["lag"].shape == (64,)
    model = load_model(checkpoint)
    assert model.config.dim == 32 and not model.training
    assert LitModel.load_from_checkpoint(checkpoint).model.config == model.config


def test_recall_is_logged_with_ceiling_and_beyond_window(small_run: Path) -> None:
    # The config's model has a memory: its own reach is unbounded, so the ceiling is 1.
    assert scalars(small_run, "recall/ceiling") == [1.0, 1.0]
    assert len(scalars(small_run, "recall/accuracy")) == 2


def test_only_matrices_of_linear_maps_decay() -> None:
    network = ModelConfig(vocab_size=64, layers=("gated_delta",), dim=32, mlp=1, tie=True)
    lit = LitModel(network=network)

    class Trainer:
        estimated_stepping_batches = 100

    lit._trainer = Trainer()  # type: ignore[assignment]
    optimiser = lit.configure_optimizers()["optimizer"]
    decayed, rest = (group["params"] for group in optimiser.param_groups)
    names = {id(p): n for n, p in lit.model.named_parameters()}
    assert len(decayed) + len(rest) == len(names)
    assert "embedding.weight" in {names[id(p)] for p in rest}
    assert all(p.dim() == 2 for p in decayed)
    assert not any("A_log" in names[id(p)] or "norm" in names[id(p)] for p in decayed)


def test_logits_are_made_only_where_labels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    head = LanguageModel.head
    monkeypatch.setattr(LanguageModel, "head", lambda m, h: asked.append(h.shape) or head(m, h))
    lit = LitModel(network=ModelConfig(vocab_size=64, layers=("linear",), dim=32))
    lit.labelled(MQAR(vocab_size=64, pairs=4).batch("train", range(5)))
    assert asked == [(20, 32)]


def test_a_number_of_batches_stays_a_whole_number() -> None:
    """Also where some module has used the other order of the union first. (Of Python 3.14 on no
    order is kept.)"""
    for clear in typing._cleanups:  # type: ignore[attr-defined]
        clear()
    str(Optional[Union[float, int]])  # noqa: UP007,UP045

    class Options:
        def __init__(self, batches: Optional[Union[int, float]] = None) -> None: ...  # noqa: UP007,UP045

    parser = TrainingParser(exit_on_error=False)
    parser.add_class_arguments(Options, "options")
    assert repr(parser.parse_args(["--options.batches", "4"]).options.batches) == "4"
