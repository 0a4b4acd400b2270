"""A killed run goes on as if nothing had happened: the same bits, from any of its checkpoints."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from layerzoo.cli import main
from layerzoo.data import MQAR
from layerzoo.model import ModelConfig
from layerzoo.support.yaml_files import config_path
from layerzoo.train.callbacks import Summary
from layerzoo.train.checkpoints import AtomicIO, Checkpoints, Resume, log_missing
from layerzoo.train.command import TrainCLI, quiet
from layerzoo.train.find_checkpoint import first_step, newest_checkpoint
from layerzoo.train.held_out import HeldOutFigures
from layerzoo.train.lit import LitModel

from .here import quick

# Its `drop` draws a random number for every row of a batch.
LAYER = {
    "name": "parallel",
    "drop": 0.5,
    "children": [{"name": "sliding", "heads": 1, "window": 4}, {"name": "linear", "heads": 1}],
}
CASES: dict[str, dict[str, Any]] = {  # an epoch has 5 batches
    "steps": {"max_steps": 8, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "accumulated": {
        **{"max_steps": 7, "val_check_interval": 5, "check_val_every_n_epoch": None},
        "accumulate_grad_batches": 2,
    },
    "epochs": {"max_epochs": 2, "val_check_interval": 2, "limit_train_batches": 9},
    "limited": {"max_steps": 9, "limit_train_batches": 4},
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick():
        yield


class Killed(Exception):
    pass


class Watch(Callback):
    """Notes what a run sees and tells, draws random numbers, and may end it before a step."""

    def __init__(self, kill: int | None = None) -> None:
        self.kill = kill
        self.batches: list[tuple[int, list[int]]] = []
        self.figures: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, n: int) -> None:
        if trainer.global_step == self.kill:
            raise Killed
        random.random(), np.random.rand()
        self.batches.append((trainer.global_step, batch["tokens"].flatten().tolist()))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            figures = {name: float(x) for name, x in trainer.callback_metrics.items()}
            self.figures.append((trainer.global_step, figures))


def fit(
    folder: Path,
    options: dict[str, Any],
    checkpoint: Path | None = None,
    kill: int | None = None,
    schedule: Any = "cosine",
    more: Sequence[Callback] = (),
    **when: Any,
) -> Watch:
    quiet()
    seed_everything(0, verbose=False)
    network = ModelConfig(vocab_size=16, layers=(LAYER,), dim=8, depth=1)
    data = MQAR(
        **{"vocab_size": 16, "length": 8, "pairs": 2},
        **{"batch_size": 4, "train_samples": 20, "val_samples": 8},
    )
    logger = TensorBoardLogger(
        folder, "", "", default_hp_metric=False, purge_step=first_step(checkpoint)
    )
    if checkpoint is not None and checkpoint.is_relative_to(folder):
        log_missing(checkpoint, logger)
    watch = Watch(kill)
    trainer = Trainer(
        logger=logger,
        callbacks=[Resume(), Summary(), HeldOutFigures(), watch, *more, Checkpoints(**when)],
        plugins=[AtomicIO()],
        **{"log_every_n_steps": 1, "accelerator": "cpu"},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        **options,
    )
    trainer.fit(LitModel(network=network, lr=0.01, schedule=schedule), data, ckpt_path=checkpoint)
    return watch


def saved(folder: Path) -> list[Path]:
    """The checkpoints by step."""
    return sorted(folder.glob("checkpoints/*.ckpt"), key=step)


def step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """The places at which two checkpoints differ in any bit."""
    if place.endswith("val_loop.batch_progress"):
        return []  # Lightning's count of held-out batches, which only a progress bar shows
    if place.endswith("unlogged.values.tokens/s"):
        return []  # is never the same twice
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for n, (x, y) in pairs for d in differences(x, y, f"{place}.{n}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [f"{place}: {str(a)[:50]} != {str(b)[:50]}"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads the files of a second in the order of this number, as text."""
    count = itertools.count(1000)
    monkeypatch.setattr(event_file_writer, "_global_uid", SimpleNamespace(get=lambda: next(count)))


SECOND = ("steps", "limited")  # the others have their steps, and the end of an epoch


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SECOND)) for n in CASES],
)
def whole(request: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, Any], Watch]:
    """An uninterrupted run with a checkpoint of every step."""
    folder, options = tmp_path_factory.mktemp(request.param), CASES[request.param]
    return folder, options, fit(folder, options, steps=1, keep=99)


def test_a_run_goes_on_from_any_step(
    whole: tuple[Path, dict[str, Any], Watch], tmp_path: Path
) -> None:
    folder, options, watch = whole
    *checkpoints, last = saved(folder)
    assert [step(path) for path in checkpoints] == list(range(1, step(last)))
    expected = torch.load(last)
    for path in checkpoints:
        n = step(path)
        again = fit(tmp_path / path.stem, options, path, steps=1, keep=1)
        assert again.batches == [batch for batch in watch.batches if batch[0] >= n], path
        assert again.figures == [figures for figures in watch.figures if figures[0] > n], path
        (end,) = saved(tmp_path / path.stem)
        assert (path, differences(expected, torch.load(end))) == (path, [])


def test_a_run_that_is_killed_again_and_again(
    whole: tuple[Path, dict[str, Any], Watch], tmp_path: Path, ordered: None
) -> None:
    """A checkpoint every other step, from which each next process goes on, in one folder."""
    folder, options, _ = whole
    last = saved(folder)[-1]
    for kill in range(3, step(last), 2):  # what is lost is a step or two, and they were logged
        with pytest.raises(Killed):
            fit(tmp_path, options, newest_checkpoint(tmp_path), kill, steps=2)
    assert [step(path) for path in saved(tmp_path)] == [kill - 3, kill - 1]
    fit(tmp_path, options, newest_checkpoint(tmp_path), steps=1)
    (end,) = (path for path in saved(tmp_path) if path.name == last.name)
    assert differences(torch.load(last), torch.load(end)) == []
    assert scalars(tmp_path) == scalars(folder)


def test_what_a_run_was_about_to_log_is_logged(
    whole: tuple[Path, dict[str, Any], Watch], tmp_path: Path, ordered: None
) -> None:
    folder, options, _ = whole
    save = Checkpoints.save

    def fatal(self: Checkpoints, trainer: Any) -> bool:
        """Ends the run as soon as it has saved: Lightning logs the step only afterwards."""
        if save(self, trainer):
            raise Killed
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", fatal)
        for n in range(1, step(saved(folder)[-1]) + 1):
            with pytest.raises(Killed):
                fit(tmp_path, options, newest_checkpoint(tmp_path), steps=1)
            assert step(saved(tmp_path)[-1]) == n
    fit(tmp_path, options, newest_checkpoint(tmp_path), steps=1)
    assert scalars(tmp_path) == scalars(folder)


def test_a_finished_run_goes_on_as_a_longer_one(tmp_path: Path) -> None:
    long, short = ({**CASES["steps"], "max_steps": n} for n in (12, 7))
    fit(tmp_path / "whole", long, schedule="constant")
    fit(tmp_path / "short", short, schedule="constant")
    (end,) = saved(tmp_path / "short")
    fit(tmp_path / "again", long, end, schedule="constant")
    (a,), (b,) = (saved(tmp_path / name) for name in ("whole", "again"))
    assert a.name == b.name == "step=12.ckpt"
    assert differences(torch.load(a), torch.load(b)) == []


def test_a_finished_run_does_nothing_more(
    whole: tuple[Path, dict[str, Any], Watch], tmp_path: Path, capsys: Any
) -> None:
    folder, options, watch = whole
    again = fit(tmp_path, options, saved(folder)[-1])
    assert again.batches == [] and again.figures == [] and saved(tmp_path) == []
    first, last = (watch.figures[n][1]["loss/held_out"] for n in (0, -1))
    line = f"loss/held_out: {first:.3f} at step {watch.figures[0][0]}, {last:.3f} at"
    assert line in capsys.readouterr().out  # although this process has measured neither


def test_every_process_has_its_own_random_state() -> None:
    states, expected = [], []
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        states += Resume().state_dict()["states"]
        expected.append((torch.rand(()).item(), np.random.rand(), random.random()))
    for rank in (0, 1):
        resume: Any = Resume()
        resume.setup(None, None, "fit")
        resume.load_state_dict({"states": states})
        resume.on_train_batch_start(SimpleNamespace(global_rank=rank), None, None, 0)
        assert (torch.rand(()).item(), np.random.rand(), random.random()) == expected[rank]


class Ask(Callback):
    """Asks for a checkpoint after every batch and validation, and notes when there is one."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int, bool]] = []

    def _ask(self, when: str, trainer: Any) -> None:
        (checkpoints,) = (c for c in trainer.callbacks if isinstance(c, Checkpoints))
        self.answers.append((when, trainer.global_step, checkpoints.save(trainer)))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, n: int
    ) -> None:
        self._ask("batch", trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._ask("validation", trainer)


def test_a_checkpoint_when_asked_loses_no_gradient_and_no_validation(tmp_path: Path) -> None:
    ask = Ask()
    options = {**CASES["accumulated"], "val_check_interval": 4, "max_steps": 3}
    fit(tmp_path, options, more=[ask])
    assert ask.answers == [
        ("validation", 0, False),  # the sanity check
        ("batch", 0, False),  # half of the gradient
        ("batch", 1, True),
        ("batch", 1, False),
        ("batch", 2, False),  # a validation is due
        ("validation", 2, True),
        ("batch", 3, True),  # the last batch of an epoch, whose gradient is of one
    ]


def test_checkpoints_come_with_the_clock_and_the_older_ones_go(
    tmp_path: Path, monkeypatch: Any
) -> None:
    now = 0.0

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, n: int) -> None:
            nonlocal now
            now += 1.0
            names.append([path.stem for path in saved(tmp_path)])

    names: list[list[str]] = []
    monkeypatch.setattr("layerzoo.train.checkpoints.time", SimpleNamespace(monotonic=lambda: now))
    leftover = tmp_path / "checkpoints" / ".step=4.ckpt.part"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    stale = tmp_path / "checkpoints" / "step=99.ckpt"  # damaged, say, so that the run began anew
    stale.write_bytes(b"half")
    options = {**CASES["steps"], "max_steps": 11, "limit_val_batches": 0}
    fit(tmp_path, options, more=[Clock()], seconds=3.0)
    assert not leftover.exists()
    assert names[2] == ["step=99"] and names[3] == ["step=3", "step=99"]
    assert names[6] == ["step=3", "step=6"]
    assert [path.stem for path in saved(tmp_path)] == ["step=9", "step=11"]


def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path: Path, monkeypatch: Any) -> None:
    sync, calls = os.fsync, itertools.count(1)

    def full(file: int) -> None:
        if next(calls) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    options = {**CASES["steps"], "max_steps": 5, "limit_val_batches": 0}
    with pytest.warns(UserWarning, match=r": No space left on device: not saved") as told:
        watch = fit(tmp_path, options, steps=2, keep=1)
    assert len(watch.batches) == 5 and os.listdir(tmp_path / "checkpoints") == ["step=2.ckpt"]
    lost = {re.split("[/:]", str(warning.message).partition(": No")[0])[-1] for warning in told}
    assert lost == {"step=4.ckpt", "step=5.ckpt", "record.json"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "some" / "a.ckpt"
    AtomicIO().save_checkpoint({"weights": torch.zeros(3)}, path)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            AtomicIO().save_checkpoint({"weights": torch.zeros(1 << 16)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and os.listdir(path.parent) == ["a.ckpt"]


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    options = {**CASES["steps"], "max_steps": 10, "limit_val_batches": 0}
    fit(tmp_path, options, steps=4, keep=4)
    *_, before, last = saved(tmp_path)
    assert newest_checkpoint(tmp_path) == newest_checkpoint(last.parent) == last
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"skipped: checkpoint .*step=10.ckpt: "):
        assert newest_checkpoint(tmp_path) == before
    last.rename(last.with_name("last.ckpt"))  # whose step is inside, if it can be read
    with pytest.warns(UserWarning, match=r"skipped: checkpoint .*last.ckpt: "):
        assert newest_checkpoint(tmp_path) == before
    before.rename(last.with_name("last.ckpt"))
    assert newest_checkpoint(tmp_path) == last.with_name("last.ckpt")
    assert newest_checkpoint(tmp_path / "none") is None


# The command line, and a real kill

RUN = [
    *("--config", "mqar", "--data.init_args.length", "16", "--data.init_args.pairs", "2"),
    *("--data.init_args.train_samples", "252", "--data.init_args.batch_size", "4"),  # 63 batches
    *("--data.init_args.val_samples", "8", "--model.network.dim", "8"),
    *("--model.network.depth", "1", "--model.network.layers", f"[{LAYER}]"),
    *("--trainer.max_steps", "120", "--trainer.val_check_interval", "50"),
    *("--trainer.callbacks", "layerzoo.checkpoints.Checkpoints", "--trainer.callbacks.steps", "7"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.logger.init_args.name", "", "--trainer.logger.init_args.save_dir"),
]


def steps_so_far(runs: Path) -> int:
    return max((step(path) for path in runs.glob("*/checkpoints/step=*.ckpt")), default=0)


@pytest.mark.slow
def test_sigkill(tmp_path: Path) -> None:
    """At a random moment, as while a file is written; batches come from two processes."""
    assert main(["fit", *RUN, str(tmp_path / "whole")]) == 0
    runs = tmp_path / "killed"
    command = [sys.executable, "-m", "layerzoo", "fit", *RUN, str(runs)]
    command += ["--data.init_args.num_workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill in (True, False):
        before = steps_so_far(runs)
        folders = sorted(runs.glob("*/checkpoints"))
        resume = ["--ckpt_path", str(folders[-1].parent)] if folders else []
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(
                [*command, *resume], env=environment, stdout=log, stderr=log
            )
        if kill:
            while steps_so_far(runs) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.SystemRandom().uniform(0, 0.1))
            process.kill()
        code = process.wait()
        assert code == (-signal.SIGKILL if kill else 0), (tmp_path / "log").read_text()
    a, b = (torch.load(next(f.rglob("step=120.ckpt"))) for f in (tmp_path / "whole", runs))
    assert differences(a, b) == []


def test_every_fit_has_what_a_resumed_one_needs(tmp_path: Path) -> None:
    config = config_path("mqar")
    more = ["--trainer.callbacks+", "layerzoo.callbacks.Diagnostics"]
    trainer = TrainCLI(["--config", config, *RUN[2:], str(tmp_path), *more], run=False).trainer
    assert isinstance(trainer.callbacks[0], Resume)  # before others that draw random numbers
    assert isinstance(trainer.strategy.checkpoint_io, AtomicIO)


def test_a_folder_without_a_checkpoint_is_an_error_of_one_line(
    tmp_path: Path, capsys: Any
) -> None:
    assert main(["fit", *RUN, str(tmp_path / "runs"), "--ckpt_path", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"checkpoint {tmp_path}: no checkpoint" in error
