"""Runs cells on this machine, on worker processes that each run many of them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .executor import Outcome
from .folder import LOG

WorkerProcess = subprocess.Popen[bytes]
EXIT_SECONDS = 10.0
"""Seconds in which a process that has raised must have gone."""


def default_slots(threads: int) -> int:
    """As many as there are GPUs, or else as the cores allow."""
    return torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // threads)


class LocalExecutor:
    """Starting a process takes seconds, so it is kept for the next cell; one that dies of a cell
    is replaced. Cells take turns on the GPUs, if there are any.

    Args:
        slots: cells at a time. threads: of the CPU, a cell. every: seconds between checkpoints.
    """

    def __init__(self, slots: int, threads: int, every: float) -> None:
        self.slots, self.threads, self.every = slots, threads, every
        self.idle: list[WorkerProcess] = []
        self.busy: dict[WorkerProcess, Path] = {}
        self.unstarted: list[tuple[Path, Outcome]] = []
        self.started = 0
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as its processes)
        """What a process says that dies of something else than a cell."""

    def start(self, folder: Path) -> None:
        try:
            worker = self._living() or self._spawn()
        except OSError as error:
            reason = f"its process does not start: {error.strerror}"
            self.unstarted.append((folder, Outcome("failed", reason)))
            return
        self.busy[worker] = folder
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile: `ended` tells
            worker.stdin.write(f"{folder}\n".encode())
            worker.stdin.flush()

    def _living(self) -> WorkerProcess | None:
        """One that is idle, but for those that died so: that is not the next cell's fault."""
        while self.idle:
            worker = self.idle.pop()
            if worker.poll() is None:
                return worker
            self._release(worker, 0)
        return None

    def _spawn(self) -> WorkerProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        gpus = torch.cuda.device_count()
        if gpus:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
            environment["CUDA_VISIBLE_DEVICES"] = shown.split(",")[self.started % gpus]
        self.started += 1
        options = (f"--every={self.every}", f"--threads={self.threads}")
        return subprocess.Popen(
            [sys.executable, "-m", "layerzoo.ablations.running.worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,  # ^C reaches us alone, and we end the workers
        )

    def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
        if self.unstarted:
            found, self.unstarted = self.unstarted, []
            return found
        pipes = {worker.stdout.fileno(): worker for worker in self.busy if worker.stdout}
        ready, _, _ = select.select([*pipes], [], [], timeout)
        found = []
        # A dead worker's pipe may be held open by its loader's processes for a while.
        dead = [w for w in self.busy if w.poll() is not None]
        for worker in dict.fromkeys([*(pipes[fd] for fd in ready), *dead]):
            assert worker.stdout is not None
            fd = worker.stdout.fileno()
            answer = os.read(fd, 4096) if fd in ready else b""
            folder = self.busy.pop(worker)
            if answer:
                self.idle.append(worker)
                found.append((folder, Outcome(*json.loads(answer))))
            else:
                self._release(worker, EXIT_SECONDS)
                found.append((folder, Outcome("failed", self._reason(folder / LOG, worker))))
        return found

    def _release(self, worker: WorkerProcess, patience: float) -> None:
        """Wait for it to go, then see to it that it and its loader's processes are gone."""
        assert worker.stdin is not None and worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        worker.stdout.close()

    def close(self, patience: float) -> None:
        workers = [*self.idle, *self.busy]
        self.idle, self.busy = [], {}
        until = time.monotonic() + patience
        try:
            for worker in workers:
                assert worker.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    worker.stdin.close()  # it saves a checkpoint and goes
            for worker in workers:
                self._release(worker, max(0, until - time.monotonic()))
        finally:  # a second ^C came
            for worker in workers:
                self._release(worker, 0)
            self.errors.close()

    def _reason(self, log: Path, worker: WorkerProcess) -> str:
        if worker.returncode < 0:
            return f"killed by signal {-worker.returncode}"
        self.errors.seek(0)
        for text in (log.read_bytes() if log.is_file() else b"", self.errors.read()):
            lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return f"its process ended with status {worker.returncode}"
