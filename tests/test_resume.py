"""A killed run goes on as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo.checkpoints import Checkpoints, newest_checkpoint
from layerzoo.training import TrainCLI

TINY = [
    *("--data.init_args.train_samples", "20", "--data.init_args.batch_size", "4"),  # 5 batches
    *("--data.init_args.val_samples", "4", "--data.init_args.length", "16"),
    *("--data.init_args.pairs", "2", "--model.network.dim", "8", "--model.network.depth", "1"),
    "--model.network.layers",
    "[{name: parallel, drop: 0.5, children: [{name: sliding, heads: 1, window: 4}, linear]}]",
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1"),
]


class Seen(Callback):
    """What a run sees and tells, by step."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.figures: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, n: int) -> None:
        self.batches.append((trainer.global_step, batch["tokens"].flatten().tolist()))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            figures = {name: float(x) for name, x in trainer.callback_metrics.items()}
            figures.pop("tokens/s")
            self.figures.append((trainer.global_step, figures))


def run(folder: Path, options: tuple[str, ...], ckpt: Path | None = None, keep: int = 99) -> Seen:
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    where = ["--trainer.logger.init_args.save_dir", str(folder)]
    where += ["--trainer.logger.init_args.name", "", "--trainer.logger.init_args.version", ""]
    cli = TrainCLI(["--config", "layerzoo/configs/mqar.yaml", *TINY, *where, *options], run=False)
    cli.trainer.callbacks = [
        c for c in cli.trainer.callbacks if type(c).__name__ != "ModelCheckpoint"
    ]
    cli.trainer.callbacks += [seen := Seen(), Checkpoints(steps=1, keep=keep)]
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt)
    return seen


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for n, (x, y) in pairs for d in differences(x, y, f"{place}.{n}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [f"{place}: {str(a)[:50]} != {str(b)[:50]}"]


CASES = {
    "steps": ("--trainer.max_steps", "12", "--trainer.val_check_interval", "3"),
    "accumulated": (
        *("--trainer.max_steps", "9", "--trainer.val_check_interval", "5"),
        *("--trainer.accumulate_grad_batches", "2"),
    ),
    "epochs": (
        *("--trainer.max_epochs", "3", "--trainer.val_check_interval", "2"),
        *("--trainer.max_steps", "-1", "--trainer.check_val_every_n_epoch", "1"),
    ),
    "limited": (
        *("--trainer.max_steps", "10", "--trainer.val_check_interval", "1.0"),
        *("--trainer.limit_train_batches", "4", "--trainer.check_val_every_n_epoch", "1"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resume(case, tmp_path: Path) -> None:
    options = CASES[case]
    whole = run(tmp_path, options)
    ckpts = sorted((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda p: int(p.stem[5:]))
    print([p.name for p in ckpts], len(whole.batches), [s for s, _ in whole.figures])
    last = torch.load(ckpts[-1])
    for ckpt in ckpts:
        n = int(ckpt.stem[5:])
        seen = run(tmp_path / ckpt.stem, options, ckpt)
        (out,) = [p for p in [tmp_path / ckpt.stem / "checkpoints" / ckpts[-1].name]]
        print("==", n)
        b = [x for x in whole.batches if x[0] >= n]
        if b != seen.batches:
            print("batches", [x[0] for x in b], [x[0] for x in seen.batches], [whole.batches.index(x) if x in whole.batches else None for x in seen.batches])
        f = [x for x in whole.figures if x[0] > n]
        if f != seen.figures:
            print("figures", [x[0] for x in f], [x[0] for x in seen.figures])
            print(f[:1], seen.figures[:1])
        if out.exists():
            for d in differences(last, torch.load(out)):
                print("  ", d)
        elif ckpt != ckpts[-1]:
            print("no final")
