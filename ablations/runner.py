"""Runs a grid's cells on a pool of worker processes, resumable from disk."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from layerzoo.layer import EXECUTION
from layerzoo.spec import SpecError

from .grid import Cell
from .worker import CONFIG, LOG, METRICS

Report = Callable[[Cell, dict[str, Any]], None]
"""Called with a cell and `{"step", "steps", "loss"}`, `{"done"}` or `{"failed": reason}`."""


def prepare(cell: Cell, out: Path) -> bool:
    """Make the cell's folder, fresh; False if the cell is finished and nothing is to do.

    Raises:
        SpecError: the folder holds another config's results, or something that is not ours.
    """
    folder = out / cell.path
    config = _runnable(cell, folder)
    if (folder / METRICS).is_file():
        before = (folder / CONFIG).read_text() if (folder / CONFIG).is_file() else ""
        if _identity(before) != _identity(config):
            raise SpecError(
                f"{folder}: holds the results of another config; give another --out, or delete it"
            )
        return False
    if folder.exists():
        if not (folder / CONFIG).is_file() and any(folder.iterdir()):
            raise SpecError(f"{folder}: is not a cell's folder; give another --out")
        shutil.rmtree(folder)  # a cell that was killed starts again
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config)
    return True


def _runnable(cell: Cell, folder: Path) -> str:
    """The cell's config as YAML, logging to its own folder."""
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {
            "save_dir": str(folder),
            "name": "",
            "version": "",
            "default_hp_metric": False,
        },
    }
    config = cell.config.copy()
    OmegaConf.update(config, "trainer.logger", logger, force_add=True, merge=False)
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    for name in quiet:
        OmegaConf.update(config, f"trainer.{name}", False, force_add=True)
    OmegaConf.update(config, "trainer.callbacks", None, force_add=True)
    if config.trainer.get("devices") is None:
        OmegaConf.update(config, "trainer.devices", 1, force_add=True)  # a worker is one process
    return OmegaConf.to_yaml(config)


def _identity(config: str) -> Any:
    """What makes a run: its config but for where it logs and how its layers are computed."""
    tree: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=False)
    tree.get("trainer", {}).pop("logger", None)
    for name in EXECUTION:
        tree.get("model", {}).pop(name, None)
    return tree


class Pool:
    """Worker processes that take cells from one queue; a dead one is replaced."""

    def __init__(self, cells: list[Cell], out: Path, jobs: int, report: Report) -> None:
        self.out, self.report, self.jobs = out, report, jobs
        self.queue: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        for cell in cells:
            self.queue.put(cell)
        self.workers: set[subprocess.Popen[str]] = set()
        self.stopped = threading.Event()

    def run(self) -> None:
        """Return when all cells have ended. Interrupted, it kills its workers first."""
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self.stopped.set()
            for worker in list(self.workers):
                worker.kill()
                worker.wait()

    def _serve(self) -> None:
        worker = None
        while not self.stopped.is_set():
            try:
                cell = self.queue.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                worker = self._start()
            if not self._run(worker, cell):
                worker = None
        if worker is not None:
            self._end(worker)

    def _start(self) -> subprocess.Popen[str]:
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        worker = subprocess.Popen(
            [sys.executable, "-m", "layerzoo.ablations.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,  # ^C reaches us alone, and we end the workers
        )
        self.workers.add(worker)
        return worker

    def _end(self, worker: subprocess.Popen[str]) -> int:
        self.workers.discard(worker)
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()
        return worker.wait()

    def _run(self, worker: subprocess.Popen[str], cell: Cell) -> bool:
        """Run a cell to its end; False if the worker died of it."""
        assert worker.stdin is not None and worker.stdout is not None
        folder = self.out / cell.path
        with contextlib.suppress(BrokenPipeError):  # it died between two cells: told below
            worker.stdin.write(f"{folder}\n")
            worker.stdin.flush()
        for line in worker.stdout:
            answer = json.loads(line)
            self.report(cell, answer)
            if "done" in answer:
                return True
        status = self._end(worker)
        if not self.stopped.is_set():
            self.report(cell, {"failed": _reason(folder / LOG, status)})
        return False


def _reason(log: Path, status: int) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "nothing was logged")
    return f"killed by signal {-status}" if status < 0 else last
