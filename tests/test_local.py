"""Worker processes: they are kept, replaced, stopped, and leave nothing behind."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from layerzoo.ablations.cells.cell import Cell, Seed
from layerzoo.ablations.cells.configs import resolve
from layerzoo.ablations.running import local
from layerzoo.ablations.running.executor import Outcome
from layerzoo.ablations.running.folder import (
    CELL,
    LOG,
    METRICS,
    PROGRESS,
    cell_lock,
    cell_state,
    prepare_folder,
    read_json,
    reason_of,
    write_json,
)
from layerzoo.ablations.running.local import LocalExecutor
from layerzoo.ablations.running.worker import run_cell
from layerzoo.support.yaml_files import config_path, read_yaml
from layerzoo.train.lit import LitModel

from .here import forks, quick

TINY = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "data.init_args.val_samples": 8,
    "data.init_args.test_samples": 8,
    "data.init_args.batch_size": 8,
    "model.network.dim": 16,
    "model.network.layers": [{"name": "linear", "heads": 2}],
}
ENDLESS = {"trainer.max_steps": 10**6, "data.init_args.train_samples": 8 * 10**6}


def cells(count: int, out: Path, **changes: Any) -> list[Path]:
    config = read_yaml(config_path("mqar"))
    for key, value in {**TINY, **changes}.items():
        OmegaConf.update(config, key, value, force_add=True)
    tree = resolve(OmegaConf.to_container(config, resolve=False))
    made = []
    for seed in range(count):
        mine = copy.deepcopy(tree)
        mine["seed_everything"] = seed
        made.append(prepare_folder(Cell({"layer": "a"}, Seed(seed, seed), mine), out))
    return made


def wait(executor: LocalExecutor, seconds: float = 60) -> list[tuple[Path, Outcome]]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := executor.ended(1):
            return found
    raise AssertionError("nothing ended")


def until_it_trains(folder: Path) -> None:
    for _ in range(600):
        if read_json(folder / PROGRESS).get("step", 0) > 1:
            return
        time.sleep(0.1)
    raise AssertionError((folder / LOG).read_text())


def memory(pid: int) -> float:
    """Resident, in MB."""
    return (
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    )


def forked(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
    """Stands for `Popen` of a worker: a process of its own that has the imports already."""
    _, _, module, *argv = command

    def work() -> None:
        os.closerange(3, 256)  # one of these tells Popen of an exec, which does not come
        os.environ.update(env)
        sys.argv = [module, *argv]
        warnings.resetwarnings()  # those of the tests are errors
        subprocess.Popen = POPEN
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (as long as the process)
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115 (as long as the process)
        try:
            sys.modules[module].main()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
        return POPEN(command, preexec_fn=work, **options)


POPEN: Any = subprocess.Popen


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalExecutor]:
    """One for several tests, whose process takes seconds to start; the last of them closes it."""
    executor = LocalExecutor(slots=1, threads=1, every=1000)
    yield executor
    if not executor.errors.closed:
        executor.close(10)


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_cells_in_a_row_leave_nothing_behind(
    tmp_path: Path, shared: LocalExecutor, count: int
) -> None:
    executor, pids = shared, set[int]()
    sizes, handles, threads = list[float](), list[int](), list[int]()
    for folder in cells(count, tmp_path):
        executor.start(folder)
        assert wait(executor) == [(folder, Outcome("finished"))]
        (worker,) = executor.idle
        pids.add(worker.pid)
        sizes.append(memory(worker.pid))
        handles.append(len(os.listdir(f"/proc/{worker.pid}/fd")))
        threads.append(len(os.listdir(f"/proc/{worker.pid}/task")))
    assert len(pids) == 1
    assert handles[-1] == handles[1] and threads[-1] == threads[1]
    # Of the first few cells the allocator keeps something; a model of these holds 0.03 MB.
    assert sizes[-1] - sizes[4] < 10, sizes


def test_a_killed_worker_is_replaced_and_a_raised_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are forked; those of the other tests are not."""
    monkeypatch.setattr(local.subprocess, "Popen", forked if forks() else POPEN)
    executor = LocalExecutor(slots=2, threads=1, every=30)
    loader = {"data.init_args.num_workers": 1}
    (endless,) = cells(1, tmp_path / "endless", **ENDLESS, **loader)
    no_kernel = {"model.impl": "triton", "model.network.layers": ["mesa"]}
    (broken,) = cells(1, tmp_path / "broken", **no_kernel)
    (whole,) = cells(1, tmp_path / "quick", **{"data.init_args.lengths": [32, 64]})
    executor.start(endless)
    executor.start(broken)  # beside it
    ((folder, outcome),) = wait(executor)
    assert folder == broken
    assert outcome.end == "failed" and "no Triton kernel yet" in outcome.reason
    assert "Traceback" in (broken / LOG).read_text()
    until_it_trains(endless)
    (worker,) = executor.busy
    lists = [path.read_text() for path in Path(f"/proc/{worker.pid}/task").glob("*/children")]
    children = [Path("/proc", pid) for text in lists for pid in text.split()]
    worker.kill()
    assert wait(executor) == [(endless, Outcome("failed", "killed by signal 9"))]
    time.sleep(1)  # its loader would notice in five
    ended = (not c.exists() or "State:\tZ" in (c / "status").read_text() for c in children)
    assert children and all(ended)
    assert not executor.idle and cell_state(endless) == "pending"
    executor.start(whole)
    assert wait(executor) == [(whole, Outcome("finished"))]
    metrics = json.loads((whole / METRICS).read_text())
    assert {f"recall/ceiling/length={n}" for n in (32, 64)} <= metrics.keys()
    executor.close(10)


def test_a_process_that_does_not_start_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    (folder,) = cells(1, tmp_path)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    executor = LocalExecutor(slots=1, threads=1, every=30)
    executor.start(folder)
    assert wait(executor) == [(folder, Outcome("failed", "its process ended with status 1"))]
    (tmp_path / "broken").write_text("#!/bin/sh\necho no module named torch >&2; exit 3\n")
    (tmp_path / "broken").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "broken"))
    executor.start(folder)
    assert wait(executor) == [(folder, Outcome("failed", "no module named torch"))]
    executor.close(1)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    executor = LocalExecutor(slots=1, threads=1, every=30)
    executor.start(folder)
    reason = "its process does not start: No such file or directory"
    assert wait(executor) == [(folder, Outcome("failed", reason))]
    executor.close(1)


def test_a_process_that_dies_idle_fails_no_cell(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "cat").write_text('#!/bin/sh\nread folder; echo \'["finished", ""]\'\n')
    (tmp_path / "cat").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "cat"))
    executor = LocalExecutor(slots=1, threads=1, every=30)
    for folder in cells(2, tmp_path):
        executor.start(folder)
        assert wait(executor) == [(folder, Outcome("finished"))]
        executor.idle[0].wait(10)  # it has gone
    executor.close(1)


def test_a_loss_that_is_not_finite_ends_a_cell_for_good(
    tmp_path: Path, shared: LocalExecutor
) -> None:
    (folder,) = cells(1, tmp_path, **{"model.lr": 1e30, "trainer.max_steps": 40})
    for _ in range(2):  # it would diverge again
        shared.start(folder)
        ((_, outcome),) = wait(shared)
        assert outcome.end == "diverged" and cell_state(folder) == "diverged"
    assert outcome.reason == read_json(folder / "diverged.json")["reason"]
    assert "at step" in outcome.reason and "first in " in outcome.reason
    assert not (folder / METRICS).exists()
    for path in (folder / "checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(bool(weight.isfinite().all()) for weight in weights)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_loss_that_is_not_finite_is_a_divergence(
    tmp_path: Path, monkeypatch: Any, split: Any
) -> None:
    """The evaluation alone overflows, of a tuning run and of a reported one."""
    (folder,) = cells(1, tmp_path)
    write_json(folder / CELL, {**read_json(folder / CELL), "split": split})
    whole = LitModel.labelled

    def labelled(lit: LitModel, batch: Any) -> Any:
        logits, *rest = whole(lit, batch)
        held_out = lit.trainer.testing if split == "test" else not lit.training
        return (logits * math.inf if held_out else logits, *rest)

    monkeypatch.setattr(LitModel, "labelled", labelled)
    with quick():
        outcome = run_cell(folder, 30, 1)
    assert outcome == Outcome(
        "diverged", "loss/held_out nan at step 2, of weights that are finite"
    )
    assert cell_state(folder) == "diverged" and reason_of(folder) == outcome.reason


def test_a_folder_that_vanishes_while_its_cell_runs_is_a_failure(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """A checkpoint makes it again, which the next run takes for the cell's."""
    (folder,) = cells(1, tmp_path)

    def vanish(lit: LitModel) -> None:
        shutil.rmtree(folder)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / ".lock").touch()

    monkeypatch.setattr(LitModel, "on_test_start", vanish)
    with quick(), pytest.raises(FileNotFoundError, match="was removed while it ran"):
        run_cell(folder, 30, 1)
    assert cell_state(folder) == "pending"
    monkeypatch.undo()
    assert cells(1, tmp_path) == [folder]
    with quick():
        assert run_cell(folder, 30, 1).end == "finished"


def test_a_run_that_is_stopped_saves_a_checkpoint(tmp_path: Path, shared: LocalExecutor) -> None:
    """The last test of those that share the executor, which this one closes."""
    (folder,) = cells(1, tmp_path, **ENDLESS)
    shared.start(folder)
    (worker,) = shared.busy
    until_it_trains(folder)
    with cell_lock(folder) as ours:
        assert not ours and cell_state(folder) == "running"
    assert run_cell(folder, 1000, 1) == Outcome("busy")  # beside it
    shared.close(30)
    assert not shared.busy and not shared.idle and cell_state(folder) == "started"
    assert worker.returncode == 0
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert step >= read_json(folder / PROGRESS)["step"] > 1
