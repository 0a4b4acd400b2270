"""The live display of a run: how many cells are done, what runs with step and loss, time left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from layerzoo.support.json_files import floats

from .executor import Outcome
from .folder import PROGRESS, read_json
from .pace import Pace, duration_text


class Display:
    """A bar for the grid and one for each running cell; without a terminal, a line a cell.

    Args:
        total: cells of the grid. done: those that had ended before, for their pace.
    """

    def __init__(
        self, console: Console, root: Path, total: int, done: Sequence[Path], slots: int
    ) -> None:
        self.console, self.root, self.slots = console, root, slots
        self.pace, self.left = Pace(), "?"
        for folder in done:
            self.pace.finished(folder)
        self.bars = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.all = self.bars.add_task("cells", total=total, completed=len(done), note="")
        self.running: dict[Path, TaskID] = {}

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()

    def ended(self, folder: Path, outcome: Outcome) -> None:
        self.pace.finished(folder)
        self.bars.advance(self.all)
        if outcome.end not in ("finished", "stopped"):
            reason = f": {outcome.reason}" if outcome.reason else ""
            self.console.print(f"{outcome.end}: {self._name(folder)}{reason}", markup=False)
        elif not self.console.is_terminal:
            all_ = self.bars.tasks[self.all]
            self.console.print(
                f"[{all_.completed:.0f}/{all_.total:.0f}] {self._name(folder)}, left: {self.left}",
                markup=False,
            )

    def retried(self, folder: Path, outcome: Outcome) -> None:
        self.console.print(
            f"tried again: {self._name(folder)}: {outcome.reason}", markup=False, highlight=False
        )

    def waits(self, folder: Path) -> None:
        host = read_json(folder / PROGRESS).get("host")
        where = f" on {host}" if host else ""
        self.console.print(
            f"waits for {self._name(folder)}: another process{where} runs it",
            markup=False,
            highlight=False,
        )

    def tick(self, running: Sequence[Path], waiting: Sequence[Path]) -> None:
        self.left = duration_text(self.pace.left(waiting, running, self.slots))
        if not self.console.is_terminal:
            return
        self.bars.update(self.all, note=f"left: {self.left}")
        for folder in self.running.keys() - {*running}:
            self.bars.remove_task(self.running.pop(folder))
        for folder in running:
            if folder not in self.running:
                self.running[folder] = self.bars.add_task(self._name(folder), total=None, note="")
            if now := floats(read_json(folder / PROGRESS)):
                self.bars.update(
                    self.running[folder],
                    completed=now["step"],
                    total=now["steps"],
                    note=f"loss {now['loss']:.3f}",
                )
