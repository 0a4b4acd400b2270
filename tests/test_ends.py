"""How a run of a grid takes what becomes of its cells: failed, diverged, damaged."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerzoo import SpecError
from layerzoo.ablations import grid_run as command
from layerzoo.ablations.command import main
from layerzoo.ablations.running.executor import Outcome
from layerzoo.ablations.running.folder import (
    CELL,
    DIVERGED,
    METRICS,
    RECORD,
    read_json,
    write_json,
)

FIGURES = {"loss/held_out": 1.0, "recall/accuracy": 0.5, "parameters": 1, "state_bytes": 1}
NAN = "loss nan at step 6; first in parameter model.out.weight"
MEMORY = "RuntimeError: out of memory"


class Cells:
    """Runs the cells of a tuned grid without training: each ends as `ends` has it, by its arm and
    what is tried, else well, with a loss that is its learning rate."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder / "out" / "tiny", folder
        self.ends: dict[str, Outcome] = {}
        self.runs, self.slots, self.running = Counter[str](), 1, list[Path]()

    def start(self, folder: Path) -> None:
        self.running.append(folder)

    def ended(self, timeout: float) -> list[tuple[Path, Outcome]]:
        folder = self.running.pop()
        about = read_json(folder / CELL)
        tuned = ",".join(about["tuned"].values())
        name = f"{about['arm']} {about['split']} {tuned}"
        self.runs[name] += 1
        outcome = self.ends.get(name, Outcome("finished"))
        if outcome.end == "finished":
            loss = float(tuned.removeprefix("lr="))
            write_json(folder / METRICS, {**FIGURES, "loss/held_out": loss, "length": 8})
            write_json(folder / RECORD, {"seconds": 1.0})
        elif outcome.end == "diverged":
            write_json(folder / DIVERGED, {"reason": outcome.reason})
        return [(folder, outcome)]

    def close(self, patience: float) -> None:
        pass

    def run(self, **how: Any) -> int:
        layers = "model.network.layers"
        tree = {
            "name": "tiny",
            "base": "mqar",
            "axes": {"layer": {n: {layers: [n]} for n in ("linear", "softmax")}},
            "seeds": [0],
            "tune": {"axes": {"model.lr": [0.1, 0.2, 300]}, "seeds": [7]},
        }
        path = self.folder / "grid.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        self.runs.clear()
        return command.run_grid(
            str(path), command.RunOptions(out=self.folder / "out", jobs=1, **how)
        )

    def tuned(self) -> Mapping[str, Any]:
        return read_json(self.root / "tuning.json")


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cells:
    out = Cells(tmp_path)
    monkeypatch.setattr(command, "LocalExecutor", lambda *args: out)
    return out


def test_a_tuning_run_that_fails_for_good_holds_up_nothing(cells: Cells, capsys: Any) -> None:
    cells.ends = {
        "linear val lr=0.1": Outcome("failed", MEMORY),
        "softmax val lr=300": Outcome("diverged", NAN),
    }
    assert cells.run(retries=2) == 1
    out, err = capsys.readouterr()
    assert cells.runs["linear val lr=0.1"] == 3, "it is tried again twice, and no more"
    assert f"linear: lr=0.1, seed 7: failed: {MEMORY}" in out
    assert f"softmax: lr=300, seed 7: diverged: {NAN}" in out
    assert "linear: tuned to lr=0.2" in out and "softmax: tuned to lr=0.1" in out
    assert "wait" not in out and "failed: tune/linear/lr=0.1/seed-7-" in err
    assert cells.runs["linear test lr=0.2"] == cells.runs["softmax test lr=0.1"] == 1
    trials = cells.tuned()["linear"]["trials"]
    assert [trial["lost"] for trial in trials] == [{"7": f"failed: {MEMORY}"}, {}, {}]
    # Status and report say so, too.
    assert main(["status", str(cells.root)]) == 1
    out = capsys.readouterr().out
    assert MEMORY in out and NAN in out
    text = (cells.root / "report" / "report.md").read_text()
    assert "**Partial: 1 of 6 tuning runs failed.**" in text
    assert f"| linear (tuning lr=0.1) | 7 | failed | {MEMORY} |" in text
    assert "| softmax (tuning lr=300) | 7 | diverged | loss nan at step 6" in text

    # Still: the status is 1, though it is not tried again in this call.
    assert cells.run(limit=0) == 1 and not cells.runs
    assert "wait" not in capsys.readouterr().out
    # It comes to an end, and is better: what it changes is said.
    cells.ends = {}
    assert cells.run() == 0
    out = capsys.readouterr().out
    assert {**cells.runs} == {"linear val lr=0.1": 1, "linear test lr=0.1": 1}
    assert "linear: tuned to lr=0.1; model.lr is at its edge, try more; was lr=0.2, its" in out
    assert "softmax: tuned to lr=0.1; model.lr is at its edge, try more\n" in out
    assert "Partial" not in (cells.root / "report" / "report.md").read_text()


def test_an_arm_all_of_whose_tuning_runs_are_lost_has_no_cells(cells: Cells, capsys: Any) -> None:
    lost = {f"linear val lr={n}": Outcome("failed", MEMORY) for n in ("0.1", "0.2")}
    cells.ends = {**lost, "linear val lr=300": Outcome("diverged", NAN)}
    assert cells.run(retries=0) == 1
    out = capsys.readouterr().out
    assert "linear: every tuning run diverged or failed, it has no cells" in out
    assert "linear have no cells: every tuning run diverged or failed" in out
    assert "wait" not in out and cells.runs["softmax test lr=0.1"] == 1
    # And so for all arms.
    cells.ends |= {f"softmax val lr={n}": Outcome("diverged", NAN) for n in ("0.1", "0.2", "300")}
    for path in cells.root.glob("tune/softmax/*/*/metrics.json"):
        path.unlink()
    assert cells.run(retries=0) == 1
    assert json.loads((cells.root / "cells.json").read_text())[-1]["split"] == "val"
    with pytest.raises(SpecError, match="no arm could be tuned; see `layerzoo ablate status"):
        main(["report", str(cells.root)])


def test_an_arm_waits_only_for_runs_that_are_left(cells: Cells, capsys: Any) -> None:
    cells.ends = {"linear val lr=0.1": Outcome("failed", MEMORY)}
    assert cells.run(limit=4, retries=0) == 1  # both of 0.1, both of 0.2
    out = capsys.readouterr().out
    assert out.count("is not tuned yet, its cells wait") == 2
    with pytest.raises(SpecError, match="no arm is tuned yet"):
        main(["report", str(cells.root)])


def test_on_a_full_disk_nothing_is_chosen_and_nothing_started(cells: Cells, capsys: Any) -> None:
    full = Outcome("failed", f"OSError: [Errno 28] {os.strerror(errno.ENOSPC)}")
    cells.ends = {"softmax val lr=300": full}  # the last
    assert cells.run(retries=5) == 1
    assert not cells.tuned() and cells.runs["softmax val lr=300"] == 1
    assert not [name for name in cells.runs if "test" in name]
    assert "the disk is full" in capsys.readouterr().err


def test_cells_stay_listed_while_a_lost_run_is_made_again(cells: Cells) -> None:
    """Else a report that is asked for meanwhile, or after ^C, has none."""
    assert cells.run() == 0
    (path,) = cells.root.glob("tune/linear/lr=300/*/metrics.json")
    path.write_text("{")  # damaged
    cells.ends = {"linear val lr=300": Outcome("finished")}
    listed = []
    ended = cells.ended

    def look(timeout: float) -> list[tuple[Path, Outcome]]:
        listed.append(json.loads((cells.root / "cells.json").read_text()))
        return ended(timeout)

    cells.ended = look
    assert cells.run() == 0
    # The choice of the softmax is known; that of the other waits for its run.
    (during,) = listed
    assert [cell["arm"] for cell in during if cell["split"] == "test"] == ["softmax"]
    assert cells.runs == {"linear val lr=300": 1}


def test_a_damaged_list_of_cells_is_named(cells: Cells) -> None:
    assert cells.run() == 0
    (cells.root / "cells.json").write_text('[{"path": "lin')
    with pytest.raises(SpecError, match=r"cells.json: is damaged; .* writes it anew"):
        main(["status", str(cells.root)])
    assert cells.run() == 0 and main(["status", str(cells.root)]) == 0
    (config,) = cells.root.glob("linear/*/config.yaml")
    config.unlink()
    with pytest.raises(SpecError, match=r"config.yaml: is lost; .* writes it anew"):
        main(["report", str(cells.root)])
    assert cells.run() == 0 and not cells.runs and config.is_file()


def test_damaged_figures_are_no_figures(cells: Cells, capsys: Any) -> None:
    assert cells.run() == 0
    (path,) = cells.root.glob("linear/*/metrics.json")
    path.write_text("{" + '"loss/held_out": 1.')
    assert main(["status", str(cells.root)]) == 1
    assert main(["report", str(cells.root)]) == 0
    assert "Partial: 1 of 2 cells have no result yet." in capsys.readouterr().out
    assert cells.run() == 0 and cells.runs == {"linear test lr=0.1": 1}
