"""Cells that run in the tests' own process, and figures that are laid out but not painted: for
tests whose subject is neither a worker process nor a picture."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from layerzoo.ablations.running.executor import Outcome
from layerzoo.ablations.running.worker import run_cell


def forks() -> bool:
    """Whether a process may be forked off this one, which has the imports. With CUDA, with a pool
    of threads, or on another system the libraries that are loaded do not survive it."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return alone and sys.platform == "linux"


class Here:
    """Stands for `LocalExecutor`: a cell runs when its end is asked for, one after the other."""

    made: list[tuple[int, int, float]] = []  # noqa: RUF012 (of all that were made)
    """The slots, threads and seconds between checkpoints that each was made with."""

    def __init__(self, slots: int, threads: int, every: float) -> None:
        self.made.append((slots, threads, every))
        self.slots, self.threads, self.every = slots, threads, every
        self.waiting: list[Path] = []

    def start(self, folder: Path) -> None:
        assert len(self.waiting) < self.slots
        self.waiting.append(folder)

    def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
        folder = self.waiting.pop(0)
        try:
            return [(folder, run_cell(folder, self.every, self.threads))]
        except Exception as error:  # it would end a worker process, whose log ends with this
            reason = traceback.format_exception_only(error)[-1].strip()
            return [(folder, Outcome("failed", reason))]

    def close(self, patience: float) -> None:
        pass


@contextmanager
def quick() -> Iterator[None]:
    """Figures are not painted, which takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield
