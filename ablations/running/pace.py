"""How long what is left of a grid takes, judged by what has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .folder import CELL, PROGRESS, RECORD, read_json


class Pace:
    """Seconds a cell, by arm, from the records of finished cells and the progress of others."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[Path, float]] = {}
        self.arms: dict[Path, str] = {}
        self.begun: dict[Path, float] = {}

    def _arm(self, folder: Path) -> str:
        if folder not in self.arms:
            self.arms[folder] = read_json(folder / CELL).get("arm", "")
        return self.arms[folder]

    def _begun(self, folder: Path) -> float:
        """The share of a waiting cell that an earlier run has done."""
        if folder not in self.begun:
            self.begun[folder] = _share_done(read_json(folder / PROGRESS))
        return self.begun[folder]

    def finished(self, folder: Path) -> None:
        """Take in a cell that has ended."""
        seconds = read_json(folder / RECORD).get("seconds")
        if seconds is not None:
            self.seconds.setdefault(self._arm(folder), {})[folder] = seconds

    def left(self, waiting: Sequence[Path], running: Sequence[Path], slots: int) -> float | None:
        """Seconds until all of these have ended, `slots` at a time; None if nothing is known."""
        progress = {folder: read_json(folder / PROGRESS) for folder in running}
        known = {arm: [*seconds.values()] for arm, seconds in self.seconds.items()}
        for folder, now in progress.items():
            if (
                self._arm(folder) not in self.seconds
                and (whole := _projected_seconds(now)) is not None
            ):
                known.setdefault(self._arm(folder), []).append(whole)
        if not known:
            return None
        means = {arm: fmean(seconds) for arm, seconds in known.items()}
        overall = fmean(means.values())
        share = {folder: self._begun(folder) for folder in waiting}
        share |= {folder: _share_done(now) for folder, now in progress.items()}
        left = {f: means.get(self._arm(f), overall) * (1 - done) for f, done in share.items()}
        longest = max((left[folder] for folder in running), default=0.0)
        return max(sum(left.values()) / max(1, slots), longest)


def _projected_seconds(progress: Mapping[str, Any]) -> float | None:
    """Seconds of the whole run, by the updates made so far."""
    made = progress.get("step", 0) - progress.get("first", 0)
    return progress["seconds"] * progress["steps"] / made if made > 0 else None


def _share_done(progress: Mapping[str, Any]) -> float:
    return progress["step"] / progress["steps"] if progress else 0.0


def duration_text(seconds: float | None) -> str:
    """In words: 40 s, 12 min, 3.5 h, 12 days; a question mark for None."""
    if seconds is None:
        return "?"
    for unit, size, below, digits in (("s", 1, 90, 0), ("min", 60, 90, 0), ("h", 3600, 48, 1)):
        if seconds < size * below:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.0f} days"
