"""Training that is no longer finite stops, says where, and spoils no checkpoint."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from layerzoo.cli import main
from layerzoo.data import MQAR
from layerzoo.model import ModelConfig
from layerzoo.spec import Diverged
from layerzoo.train.command import quiet
from layerzoo.train.finite import Finite
from layerzoo.train.lit import LitModel

QUIET = ("enable_progress_bar", "enable_model_summary")
TINY = {
    "data.init_args.length": 16,
    "data.init_args.pairs": 2,
    "data.init_args.batch_size": 4,
    "data.init_args.val_samples": 4,
    "model.network.dim": 16,
    "model.network.layers": "[{name: linear, heads: 2}]",
    "trainer.max_steps": 8,
    "trainer.val_check_interval": 2,
    **{f"trainer.{name}": "false" for name in QUIET},
}


def fit(folder: Path, **options: Any) -> int:
    where = {"save_dir": folder, "name": "", "version": ""}
    options = {**{f"trainer.logger.init_args.{n}": v for n, v in where.items()}, **TINY, **options}
    args = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return main(["fit", "--config", "mqar", *args])


def weights(checkpoint: Path) -> list[Tensor]:
    return [*torch.load(checkpoint, weights_only=True)["state_dict"].values()]


def finite(tensors: list[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize("checkpoint", [{}, {"save_weights_only": "true"}])
def test_a_fit_that_diverges_says_where_and_leaves_the_good_checkpoint(
    tmp_path: Path, capsys: Any, checkpoint: dict[str, str]
) -> None:
    kept = {f"trainer.callbacks.init_args.{name}": value for name, value in checkpoint.items()}
    assert fit(tmp_path, **{"model.lr": 1e37, "model.warmup": 0.5, **kept}) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    said = r"layerzoo: diverged: (loss|gradient|weights) .*at step \d.*; first in .*model\.\w+"
    assert re.match(said, err), err
    for path in tmp_path.rglob("*.ckpt"):
        assert finite(weights(path)), path


def test_a_fit_in_half_precision_stops_at_the_first_overflow(tmp_path: Path, capsys: Any) -> None:
    assert fit(tmp_path, **{"model.lr": 1000, "trainer.precision": "16-true"}) == 1
    assert "layerzoo: diverged: " in capsys.readouterr().err
    assert all(finite(weights(path)) for path in tmp_path.rglob("*.ckpt"))


def test_a_held_out_loss_that_is_not_finite_is_no_success(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation alone overflows."""
    whole = LitModel.labelled

    def labelled(lit: LitModel, batch: Any) -> Any:
        logits, labels, rest = whole(lit, batch)
        return logits if lit.training else logits * math.inf, labels, rest

    monkeypatch.setattr(LitModel, "labelled", labelled)
    assert fit(tmp_path) == 1
    captured = capsys.readouterr()
    assert "diverged: loss/held_out nan at step 8" in captured.err
    assert "loss/held_out: nan" in captured.out, "the summary comes first"
    assert finite(weights(tmp_path / "checkpoints" / "last.ckpt"))


def test_a_fit_that_stays_finite_ends_well(tmp_path: Path) -> None:
    assert fit(tmp_path) == 0
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


class Break(Callback):
    """Spoils a number of the second block after the third update."""

    def __init__(self, what: str) -> None:
        self.what = what

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != 3:
            return
        block = pl_module.model.blocks[1]
        if self.what == "weight":
            block.layer.q.weight[0, 0] = math.nan
        elif self.what == "output":
            block.norm.register_forward_hook(lambda part, args, out: out * math.inf)
        elif self.what == "gradient":
            block.norm.register_forward_hook(lambda part, args, out: Steep.apply(out))


class Steep(torch.autograd.Function):
    """Of a function that is finite where its slope is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * math.inf


def train(folder: Path, *callbacks: Callback, **options: Any) -> LitModel:
    trainer = Trainer(
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Finite(), *callbacks],
        default_root_dir=folder,
        **{"max_steps": 6, "enable_checkpointing": False, "limit_val_batches": 0, **options},
    )
    quiet()
    lit = LitModel(network=ModelConfig(vocab_size=16, layers=("linear",), dim=16, depth=2))
    trainer.fit(lit, MQAR(vocab_size=16, length=16, pairs=2, batch_size=4, train_samples=48))
    return lit


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weight", "loss nan at step 3; first in parameter model.blocks.1.layer.q.weight"),
        ("output", "loss nan at step 3; first in the output of model.blocks.1.norm (RMSNorm)"),
        # The first that is made: gradients go from the last block to the first.
        (
            "gradient",
            "gradient at step 3 not finite; first in that of parameter model.blocks.1.norm.weight",
        ),
    ],
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_first_tensor_is_named(
    tmp_path: Path, what: str, message: str, accumulated: int
) -> None:
    with pytest.raises(Diverged) as error:
        train(tmp_path, Break(what), accumulate_grad_batches=accumulated)
    assert str(error.value) == message


def test_a_loss_without_a_cause_in_the_model_is_told_alone(tmp_path: Path) -> None:
    def nan(
        lit: LitModel, batch: Any, batch_idx: int, step: Any = LitModel.training_step
    ) -> Tensor:
        return step(lit, batch, batch_idx) * math.nan

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged) as error:
        patch.setattr(LitModel, "training_step", nan)
        train(tmp_path)
    assert str(error.value) == "loss nan at step 0"


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_checkpoint_of_broken_weights_replaces_a_good_one(
    tmp_path: Path, weights_only: bool
) -> None:
    """Not even right after the update that broke them."""
    keep = ModelCheckpoint(
        tmp_path, save_last=True, every_n_train_steps=1, save_weights_only=weights_only
    )
    with pytest.raises(Diverged, match="weights at step 3 not finite; first in parameter model"):
        train(tmp_path, Break("weight"), keep, enable_checkpointing=True)
    saved = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert saved == ["epoch=0-step=2.ckpt", "last.ckpt"]
    for name in saved:
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] == 2
        assert finite(weights(tmp_path / name))


def test_what_the_last_update_breaks_is_found(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="weights at step 3 not finite"):
        train(tmp_path, Break("weight"), limit_train_batches=3, max_epochs=1)


def test_numbers_whose_squares_overflow_are_finite(tmp_path: Path) -> None:
    class Far(Callback):
        @torch.no_grad()
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.unused = torch.nn.Parameter(torch.full((9,), 1e30))

    train(tmp_path, Far())


@pytest.mark.parametrize(("steps", "ends"), [(12, True), (99, False)])
def test_a_scaler_may_skip_updates_but_not_for_ever(
    tmp_path: Path, steps: int, ends: bool
) -> None:
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    how = {"max_steps": steps, "plugins": [plugin]}
    if ends:
        lit = train(tmp_path, Break("gradient"), **how)
        assert finite([p.detach() for p in lit.parameters()]) and scaler.get_scale() < 2.0**16
    else:
        with pytest.raises(Diverged, match=r"gradient at step 4\d not finite"):
            train(tmp_path, Break("gradient"), **how)
