"""The runner: queue, retries, folders and their locks, and what a grid's progress says."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from layerzoo import SpecError
from layerzoo.ablations import grid_run as command
from layerzoo.ablations.cells.cell import Cell, Seed, identity_of
from layerzoo.ablations.running import runner
from layerzoo.ablations.running.executor import Outcome
from layerzoo.ablations.running.folder import (
    CELL,
    DIVERGED,
    FAILED,
    LOG,
    METRICS,
    PROGRESS,
    RECORD,
    cell_lock,
    cell_state,
    prepare_folder,
    read_json,
    reason_of,
    write_json,
)
from layerzoo.ablations.running.folder import CONFIG as CONFIG_FILE
from layerzoo.ablations.running.pace import Pace, duration_text
from layerzoo.ablations.running.worker import run_cell

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_steps": 2},
    "model": {"lr": 0.01, "network": {"layers": ["linear"]}},
    "data": {"class_path": "MQAR", "init_args": {"length": 8, "seed": 0}},
}


def cell(arm: str = "a", seed: int = 0, **changes: Any) -> Cell:
    return Cell({"layer": arm}, Seed(seed, seed), {**CONFIG, "seed_everything": seed, **changes})


class Script:
    """An executor that ends cells as it is told to; `answers(folder, nth)` of the nth run."""

    def __init__(self, answers: Callable[[Path, int], Outcome], slots: int = 2) -> None:
        self.answers, self.slots = answers, slots
        self.running: list[Path] = []
        self.runs, self.most = Counter[Path](), 0

    def start(self, folder: Path) -> None:
        self.running.append(folder)
        self.most = max(self.most, len(self.running))

    def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
        folder = self.running.pop(0)
        self.runs[folder] += 1
        outcome = self.answers(folder, self.runs[folder])
        if outcome.end == "finished":
            write_json(folder / METRICS, {"loss": 1})
        if outcome.end == "diverged":
            write_json(folder / DIVERGED, {"reason": outcome.reason})
        return [(folder, outcome)]

    def close(self, patience: float) -> None:
        pass


class Notes:
    def __init__(self) -> None:
        self.ends: list[str] = []
        self.retries = 0
        self.waited: list[Path] = []

    def ended(self, folder: Path, outcome: Outcome) -> None:
        self.ends.append(outcome.end)

    def retried(self, folder: Path, outcome: Outcome) -> None:
        self.retries += 1

    def waits(self, folder: Path) -> None:
        self.waited.append(folder)

    def tick(self, running: Sequence[Path], waiting: Sequence[Path]) -> None:
        pass


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [prepare_folder(cell(seed=n), tmp_path) for n in range(5)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.01)


def test_every_cell_runs_once_and_slots_are_kept(folders: list[Path]) -> None:
    executor, notes = Script(lambda folder, nth: Outcome("finished")), Notes()
    ends = runner.run_folders(folders, executor, 1, notes)
    assert {*ends} == {*folders} and {*executor.runs.values()} == {1}
    assert executor.most == 2 and notes.ends == ["finished"] * 5
    again = Script(lambda folder, nth: Outcome("finished"))
    assert len(runner.run_folders(folders, again, 1, Notes())) == 5 and not again.runs


def test_a_failed_cell_is_retried_and_then_reported(folders: list[Path]) -> None:
    def answers(folder: Path, nth: int) -> Outcome:
        if folder == folders[0] or (folder == folders[1] and nth == 1):
            return Outcome("failed", "killed by signal 9")
        return Outcome("diverged", "loss nan") if folder == folders[2] else Outcome("finished")

    executor, notes = Script(answers), Notes()
    ends = runner.run_folders(folders, executor, 2, notes)
    assert [executor.runs[folder] for folder in folders] == [3, 2, 1, 1, 1]
    assert [ends[folder].end for folder in folders] == ["failed", "finished", "diverged"] + [
        "finished"
    ] * 2
    assert notes.retries == 3 and len(notes.ends) == 5
    assert read_json(folders[0] / FAILED) == {"reason": "killed by signal 9"}
    assert cell_state(folders[0]) == "failed" and cell_state(folders[1]) == "finished"


def test_a_cell_that_another_process_runs_is_waited_for(folders: list[Path]) -> None:
    def answers(folder: Path, nth: int) -> Outcome:
        return Outcome("busy" if folder == folders[0] and nth < 3 else "finished")

    executor, notes = Script(answers), Notes()
    ends = runner.run_folders(folders, executor, 0, notes)
    assert executor.runs[folders[0]] == 3 and ends[folders[0]].end == "finished"
    assert notes.waited == folders[:1], "told once"

    # It ends there meanwhile: its result is taken, and it is not run again.
    def elsewhere(folder: Path, nth: int) -> Outcome:
        write_json(folder / METRICS, {"loss": 2})
        return Outcome("busy")

    (folders[0] / METRICS).unlink()
    executor = Script(elsewhere)
    assert runner.run_folders(folders[:1], executor, 0, Notes()) == {
        folders[0]: Outcome("finished")
    }
    assert executor.runs[folders[0]] == 1 and read_json(folders[0] / METRICS) == {"loss": 2}


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome("finished"), "finished, but its folder has lost what it wrote"),
        (Outcome("diverged", "loss nan"), "diverged, but its folder has lost what it wrote"),
        (Outcome("stopped"), "was stopped, but not by this run"),
    ],
)
def test_an_end_that_the_folder_does_not_bear_out_is_a_failure(
    folders: list[Path], outcome: Outcome, told: str
) -> None:
    """The folder was removed, another user stopped the task. It is tried again, a few times."""

    class Lost(Script):
        def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
            self.running[0].mkdir(exist_ok=True)
            found = super().ended(timeout)
            shutil.rmtree(found[0][0])
            return found

    executor, notes = Lost(lambda folder, nth: outcome), Notes()
    ends = runner.run_folders(folders[:1], executor, 2, notes)
    assert ends == {folders[0]: Outcome("failed", told)}
    assert executor.runs[folders[0]] == 3 and notes.retries == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_run_but_not_what_runs(folders: list[Path], code: int) -> None:
    full = Outcome("failed", f"OSError: {os.strerror(code)}")
    executor = Script(lambda f, n: full if f == folders[0] else Outcome("finished"))
    ends = runner.run_folders(folders, executor, 5, Notes())
    # Two were running; the first was not tried again, and no other was begun.
    assert [*ends] == folders[:2] and [e.end for e in ends.values()] == ["failed", "finished"]


def test_a_folder_holds_a_config_that_says_who_it_is(tmp_path: Path) -> None:
    folder = prepare_folder(cell(), tmp_path)
    about = json.loads((folder / CELL).read_text())
    assert about["arm"] == "a" and about["seed"] == {"init": 0, "data": 0}
    assert about["identity"] == identity_of(CONFIG) and about["identity"][:8] in folder.name
    before = (folder / CELL).stat().st_mtime_ns
    assert (
        prepare_folder(cell(), tmp_path) == folder and (folder / CELL).stat().st_mtime_ns == before
    )
    (folder / CELL).unlink()  # killed while the folder was made
    assert prepare_folder(cell(), tmp_path) == folder and (folder / CELL).is_file()
    write_json(folder / CELL, {**about, "identity": "another"})
    with pytest.raises(SpecError, match="is of another config; give another --out"):
        prepare_folder(cell(), tmp_path)


@pytest.mark.parametrize("damage", ["", '{"arm": "a", "ide', "[1]", "\0\0\0", None])
def test_damaged_files_of_a_cell_are_found_out_again(tmp_path: Path, damage: str | None) -> None:
    folder = prepare_folder(cell(), tmp_path)
    whole = {name: (folder / name).read_text() for name in (CELL, CONFIG_FILE)}
    for name in (LOG, "hparams.yaml", "events.out.tfevents.1.vm.2.measured", "recall_lag-lag.png"):
        (folder / name).touch()
    for name in (CELL, METRICS, DIVERGED, PROGRESS):
        if damage is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_text(damage)
    (folder / CONFIG_FILE).unlink()
    assert cell_state(folder) == "pending", "without figures it has not finished"
    pace = Pace()
    pace.finished(folder)
    assert pace.left([folder], [folder], 1) is None
    assert prepare_folder(cell(), tmp_path) == folder
    assert whole == {name: (folder / name).read_text() for name in whole}
    (folder / CONFIG_FILE).unlink()  # alone
    prepare_folder(cell(), tmp_path)
    assert whole == {name: (folder / name).read_text() for name in whole}
    (folder / FAILED).write_text("{")
    assert cell_state(folder) == "failed" and reason_of(folder) == "unknown"


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / cell().path / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(SpecError, match="is not a cell's folder"):
        prepare_folder(cell(), tmp_path)
    assert precious.read_text() == "years of work"


def test_identity_is_what_is_computed_not_how() -> None:
    trainer, model, data = CONFIG["trainer"], CONFIG["model"], CONFIG["data"]
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    same = (
        {"trainer": {**trainer, "logger": False, "accelerator": "cpu"}},
        {"trainer": {**trainer, "callbacks": [checkpoint]}},
        {"model": {**model, "impl": "recurrent", "checkpoint": True, "compiled": True}},
        {"data": {**data, "init_args": {**data["init_args"], "num_workers": 4}}},
    )
    other = (
        {"seed_everything": 1},
        {"trainer": {"max_steps": 3}},
        {"trainer": {**trainer, "precision": "bf16-mixed"}},
        {"trainer": {**trainer, "callbacks": [checkpoint, {"class_path": "EarlyStopping"}]}},
        {"model": {**model, "lr": 0.02}},
        {"data": {**data, "init_args": {"length": 9, "seed": 0}}},
    )
    assert {identity_of({**CONFIG, **change}) for change in same} == {identity_of(CONFIG)}
    assert len({identity_of({**CONFIG, **change}) for change in (*other, {})}) == len(other) + 1


def test_states_of_a_folder(tmp_path: Path) -> None:
    folder = prepare_folder(cell(), tmp_path)
    assert cell_state(folder) == "pending"
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step=1.ckpt").touch()
    assert cell_state(folder) == "started"
    write_json(folder / FAILED, {"reason": "it"})
    assert cell_state(folder) == "failed"
    with cell_lock(folder) as ours:
        assert ours and cell_state(folder) == "running"
        with cell_lock(folder) as too:
            assert not too
    assert cell_state(folder) == "failed"
    write_json(folder / DIVERGED, {"reason": "loss nan"})
    assert cell_state(folder) == "diverged"
    write_json(folder / METRICS, {})
    assert cell_state(folder) == "finished"


def test_a_cell_has_the_threads_that_it_is_given(tmp_path: Path) -> None:
    folder, before = prepare_folder(cell(), tmp_path), torch.get_num_threads()
    write_json(folder / METRICS, {})
    try:
        torch.set_num_threads(2)
        assert run_cell(folder, 30, 1) == Outcome("finished") and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_json_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and [*tmp_path.iterdir()] == [path]


def test_the_time_left_is_judged_by_arm(tmp_path: Path) -> None:
    fast, slow = (
        [prepare_folder(cell(a, n), tmp_path) for n in range(3)] for a in ("fast", "slow")
    )
    pace = Pace()
    assert pace.left(fast, [], 1) is None
    for folder, seconds in ((fast[0], 10.0), (slow[0], 100.0)):
        write_json(folder / RECORD, {"seconds": seconds})
        pace.finished(folder)
    assert pace.left([*fast[1:], *slow[1:]], [], 1) == pytest.approx(220)
    assert pace.left([*fast[1:], *slow[1:]], [], 2) == pytest.approx(110)
    # A running cell counts with what is left of it; no slot can share it.
    write_json(slow[1] / PROGRESS, {"step": 5, "steps": 20, "first": 0, "seconds": 30.0})
    assert pace.left([], slow[1:2], 4) == pytest.approx(75)
    # An arm of which none has finished: by its own progress, counted from where it resumed.
    other = prepare_folder(cell("other"), tmp_path)
    write_json(other / PROGRESS, {"step": 6, "steps": 10, "first": 4, "seconds": 8.0})
    assert pace.left([], [other], 1) == pytest.approx(0.4 * 40)
    each = [duration_text(s) for s in (None, 40, 600, 7200, 172799, 172800)]
    assert each == ["?", "40 s", "10 min", "2.0 h", "48.0 h", "2 days"]


def test_interrupted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time while it says so."""
    said: list[str] = []

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    def printed(_: Any, text: str) -> None:
        said.append(text)
        if text.startswith("interrupted"):
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run_stages", interrupted)
    monkeypatch.setattr(command.Console, "print", printed)
    assert command.run_grid("quickstart", command.RunOptions(out=tmp_path)) == 130
    assert said[-1] == "the same command goes on where this one stopped"
