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
from .folder import FAILED, state, write_json

LOOK = 0.5
"""Seconds between two looks at what runs."""


class Watcher(Protocol):
    """What is told of a run as it goes."""

    def ended(self, folder: Path, outcome: Outcome) -> None:
        """A cell has come to its end, for this call."""
        ...

    def retried(self, folder: Path, outcome: Outcome) -> None:
        """A cell failed, and will be tried again."""
        ...

    def look(self, running: Sequence[Path], waiting: Sequence[Path]) -> None:
        """Called about every LOOK seconds."""
        ...


def run(
    folders: Sequence[Path], executor: Executor, retries: int, watcher: Watcher
) -> dict[Path, Outcome]:
    """Run cells to their ends, each failed one up to `retries` times again, and return these.

    A cell that another process runs is asked for again until it has ended. On a full disk no more
    cells are started: those left are missing in what is returned.
    """
    queue, running = deque(folders), dict[Path, None]()
    tries, ends, not_before = Counter[Path](), dict[Path, Outcome](), dict[Path, float]()
    full = False

    def end(folder: Path, outcome: Outcome) -> None:
        ends[folder] = outcome
        watcher.ended(folder, outcome)

    while running or (queue and not full):
        for _ in range(len(queue) if not full else 0):
            if len(running) == executor.slots:
                break
            folder = queue.popleft()
            now = state(folder)
            if now == "finished" or now == "diverged":  # in another process, meanwhile
                end(folder, Outcome(now))
            elif time.monotonic() < not_before.get(folder, 0):
                queue.append(folder)
            else:
                executor.start(folder)
                running[folder] = None
        if not running and queue:
            time.sleep(LOOK)  # all that is left runs elsewhere
        for folder, outcome in executor.ended(LOOK) if running else ():
            del running[folder]
            if outcome.end == "busy":
                not_before[folder] = time.monotonic() + 2 * LOOK
                queue.append(folder)
                continue
            full = full or disk_full(outcome)
            if outcome.end == "failed":
                tries[folder] += 1
                with suppress(OSError):  # a full disk: the next run tries again anyway
                    write_json(folder / FAILED, {"reason": outcome.reason})
                if tries[folder] <= retries and not full:
                    watcher.retried(folder, outcome)
                    queue.append(folder)
                    continue
            end(folder, outcome)
        watcher.look([*running], [*queue])
    return ends


def disk_full(outcome: Outcome) -> bool:
    return outcome.end == "failed" and os.strerror(errno.ENOSPC) in outcome.reason
