"""Runs cells as tasks of a Ray cluster that runs already."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerzoo.spec import SpecError
from layerzoo.support import internals

from .executor import Outcome


class RayExecutor:
    """Runs cells on the nodes of the cluster at RAY_ADDRESS, else of the one on this machine.

    A cell starts on a node that has CPUs (and GPUs) free; Ray does not retry it. Its folder must
    be on a file system that all nodes mount at the same path and that locks files between them,
    and layerzoo must be installed on all nodes. A cell whose node is taken for dead may write on
    until Ray's worker there notices (1 s if the node's daemon was killed, 60 s if the cluster's
    head was); it holds its lock until then.

    Args:
        run: runs a cell; it is pickled, so a function of a module or a `functools.partial` of
            one. Asked to stop, it gets a SIGINT, which does not wake it from a system call. Its
            process runs other cells later.
        slots: how many cells run at a time; None is as many as the nodes have room for. More
            wait in Ray's queue, for nodes that join.
        threads: CPUs that a cell takes.
        gpus: GPUs that a cell takes, below 1 a share of one; 0 takes none, and hides none. None
            is one, if a node has any.

    Raises:
        SpecError: ray is not installed, no cluster answers, or no node has room for a cell.
    """

    def __init__(
        self,
        run: Callable[[Path], Outcome],
        slots: int | None = None,
        threads: int = 1,
        gpus: float | None = None,
    ) -> None:
        if gpus is not None and gpus > 1 and gpus % 1:
            raise SpecError(f"gpus: must be whole above 1, got {gpus}")
        self._ray = _import_ray()
        self._run, self._running = run, dict[Any, Path]()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = float(any(node.get("GPU") for node in nodes))
        needs = {"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}
        room = sum(_room(node, needs) for node in nodes)
        if not room:
            self.close(0)
            wanted = " and ".join(f"{number:g} {what}" for what, number in needs.items())
            raise SpecError(f"no node of the Ray cluster has {wanted}; give a cell less")
        self.slots = room if slots is None else slots
        self._task = self._ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_call)

    def start(self, folder: Path) -> None:
        path = folder.absolute()  # a worker has a working directory of its own
        self._running[self._task.options(name=str(path)).remote(self._run, path)] = folder

    def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
        if not self._running:
            return []
        self._ray.wait(list(self._running), timeout=timeout)
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [(self._running.pop(task), self._outcome(task)) for task in done]

    def _outcome(self, task: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            return Outcome("failed", str(error).rstrip().rpartition("\n")[2])
        except errors.OutOfMemoryError:
            return Outcome("failed", "its node ran out of memory")
        except errors.NodeDiedError:
            return Outcome("failed", "its node died")
        except (errors.WorkerCrashedError, errors.LocalRayletDiedError):
            return Outcome("failed", "its worker died")
        except errors.RayError as error:  # cancelled by another, an environment that is not set up
            return Outcome("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def close(self, patience: float) -> None:
        tasks, end = list(self._running), time.monotonic() + patience
        for force in (False, True):
            for task in tasks:
                self._ray.cancel(task, force=force)
            if tasks:
                left = None if force else max(0.0, end - time.monotonic())
                _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=left)
        self._running.clear()
        if self._ours:
            self._ray.shutdown()


def run_task(folder: Path, every: float, threads: int) -> Outcome:
    """`worker.run_cell`, which a SIGINT asks to stop."""
    from .worker import run_cell

    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        return run_cell(folder, every, threads, stop.is_set)
    finally:
        signal.signal(signal.SIGINT, before)


def _call(run: Callable[[Path], Outcome], folder: Path) -> Outcome:
    """What Ray pickles by name; it takes no partial."""
    return run(folder)


def _room(has: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many cells fit a node. Not `//`, by which nine tenths of a GPU make one."""
    return min(int(has.get(what, 0) / number) for what, number in needs.items())


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise SpecError("needs the ray extra: pip install 'layerzoo[ray]'") from None


def _connect(ray: Any) -> None:
    # One attempt, 40 s where nothing listens; Ray makes twenty.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init("auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:  # of no cluster, and of a malformed address
        where = os.environ.get("RAY_ADDRESS")
        what = f"no Ray cluster at RAY_ADDRESS={where}" if where else "no Ray cluster runs here"
        way = "start one with 'ray start --head', or run with --executor local"
        raise SpecError(f"{what}; {way}") from error
    except RuntimeError as error:  # of other versions, or of a machine that is none of its nodes
        ray.shutdown()
        what = " ".join(str(error).split())
        raise SpecError(f"{what}; run on a node of the cluster, as it does") from error
    finally:
        signal.signal(signal.SIGTERM, terminate)  # Ray puts its own, which prints a backtrace
    # What became of nodes and workers we report ourselves; Ray dumps its logs on our output.
    internals.silence_workers(ray)
