"""What starts cells and tells which have ended: the local machine, or a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, Protocol


class Outcome(NamedTuple):
    """How the run of a cell ended.

    end: finished; diverged, a number is not finite; failed; busy, another process runs it; or
        stopped, asked to, behind a checkpoint.
    reason: of a divergence or failure, in one line.
    """

    end: Literal["finished", "diverged", "failed", "busy", "stopped"]
    reason: str = ""


class Executor(Protocol):
    """Runs cells by their folders."""

    slots: int
    """How many cells run at a time."""

    def start(self, folder: Path) -> None:
        """Run a cell; called only while fewer than `slots` run."""
        ...

    def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
        """The cells that have ended since the last call; waits up to `timeout` seconds for one."""
        ...

    def close(self, patience: float) -> None:
        """Stop what runs, which may save a checkpoint within `patience` seconds, and leave no
        process behind."""
        ...
