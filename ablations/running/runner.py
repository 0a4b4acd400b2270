"""Runs a grid's cells on an executor: the queue, retries, and what is known of the time left."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from .executor import Executor, Outcome
from .folder import ENDED, FAILED, cell_state, reason_of, write_json

LOOK_SECONDS = 0.5
"""Seconds between two looks at what runs."""


class RunObserver(Protocol):
    """What is told of a run as it goes."""

    def ended(self, folder: Path, outcome: Outcome) -> None:
        """A cell has come to its end, for this call."""
        ...

    def retried(self, folder: Path, outcome: Outcome) -> None:
        """A cell failed, and will be tried again."""
        ...

    def waits(self, folder: Path) -> None:
        """A cell is another process's, and waited for."""
        ...

    def tick(self, running: Sequence[Path], waiting: Sequence[Path]) -> None:
        """Called about every LOOK seconds."""
        ...


def run_folders(
    folders: Sequence[Path], executor: Executor, retries: int, observer: RunObserver
) -> dict[Path, Outcome]:
    """Run cells to their ends, each failed one up to `retries` times again, and return these:
    finished, diverged or failed, as their folders say, too.

    A cell that another process runs is asked for again until it has ended. On a full disk no more
    cells are started: those left are missing in what is returned.
    """
    queue, running, told = deque(folders), dict[Path, None](), set[Path]()
    tries, ends, not_before = Counter[Path](), dict[Path, Outcome](), dict[Path, float]()
    full = False

    def end(folder: Path, outcome: Outcome) -> None:
        ends[folder] = outcome
        observer.ended(folder, outcome)

    while running or (queue and not full):
        for _ in range(len(queue) if not full else 0):
            if len(running) == executor.slots:
                break
            folder = queue.popleft()
            now = cell_state(folder)
            if now in ENDED:  # in another process, meanwhile
                end(folder, Outcome(now, reason_of(folder)))
            elif time.monotonic() < not_before.get(folder, 0):
                queue.append(folder)
            else:
                executor.start(folder)
                running[folder] = None
        if not running and queue:
            time.sleep(LOOK_SECONDS)  # all that is left runs elsewhere
        for folder, outcome in executor.ended(LOOK_SECONDS) if running else ():
            del running[folder]
            if outcome.end == "busy":
                not_before[folder] = time.monotonic() + 2 * LOOK_SECONDS
                queue.append(folder)
                if folder not in told:
                    observer.waits(folder)
                told.add(folder)
                continue
            outcome = _checked_outcome(folder, outcome)
            full = full or disk_full(outcome)
            if outcome.end == "failed":
                tries[folder] += 1
                with suppress(OSError):  # a full disk: the next run tries again anyway
                    write_json(folder / FAILED, {"reason": outcome.reason})
                if tries[folder] <= retries and not full:
                    observer.retried(folder, outcome)
                    queue.append(folder)
                    continue
            end(folder, outcome)
        observer.tick([*running], [*queue])
    return ends


def _checked_outcome(folder: Path, outcome: Outcome) -> Outcome:
    """An outcome that the folder does not bear out is a failure."""
    if outcome.end == "stopped":
        return Outcome("failed", "was stopped, but not by this run")
    if outcome.end in ENDED and cell_state(folder) != outcome.end:
        return Outcome("failed", f"{outcome.end}, but its folder has lost what it wrote")
    return outcome


def disk_full(outcome: Outcome) -> bool:
    """Whether no cell can write: the disk is full, or what the user may have of it."""
    full = map(os.strerror, (errno.ENOSPC, errno.EDQUOT))
    return outcome.end == "failed" and any(text in outcome.reason for text in full)
