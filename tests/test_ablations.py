"""Grids: cells, pairing, resuming, failing, reporting."""

from __future__ import annotations

import fcntl
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo import SpecError
from layerzoo.ablations import plot as plotting
from layerzoo.ablations.claims import Claim, judge
from layerzoo.ablations.command import run
from layerzoo.ablations.grid import load_grid
from layerzoo.ablations.report import bound_of
from layerzoo.ablations.rows import Row
from layerzoo.ablations.runner import Pool, prepare
from layerzoo.ablations.statistics import mean_interval, window_bound


def narrow(window: int) -> dict[str, Any]:
    return {"model.network.layers": [{"name": "sliding", "heads": 2, "window": window}]}


def claim(**changes: Any) -> dict[str, Any]:
    """One that holds of the cells below."""
    fields = {"arm": "window", "metric": "recall/queries", "value": 64.0, "tolerance": 0.0}
    return {**fields, "source": "arithmetic", **changes}


def grid_file(folder: Path, **changes: Any) -> Path:
    """A grid of two arms and two seeds that runs in a moment."""
    layers = "model.network.layers"
    tree = {
        "name": "tiny",
        "base": "mqar",
        "set": {
            "trainer.max_steps": 2,
            "trainer.val_check_interval": 2,
            "data.init_args.val_samples": 8,
            "data.init_args.test_samples": 8,
            "data.init_args.batch_size": 8,
            "model.network.dim": 16,
        },
        "axes": {
            "layer": {
                "window": {layers: [{"name": "sliding", "heads": 2, "window": 8}]},
                "memory": {layers: [{"name": "linear", "heads": 2}]},
            }
        },
        "seeds": [0, 1],
        "window_arm": {"layer": "window"},
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_grid_runs_resumes_and_reports(tmp_path: Path, capsys: Any) -> None:
    broken = {"model.network.layers": ["linear"], "model.impl": "triton"}  # fails when it runs
    tree = yaml.safe_load(grid_file(tmp_path).read_text())
    path = grid_file(tmp_path, axes={"layer": {**tree["axes"]["layer"], "broken": broken}})
    assert run(str(path), tmp_path, jobs=2) == 1
    out, err = capsys.readouterr()
    assert "6 of 6 cells to run" in out
    assert "failed: broken/seed-0: " in err and "no Triton kernel yet" in err
    root = tmp_path / "tiny"
    first = {p.parent: p.read_text() for p in sorted(root.rglob("metrics.json"))}
    assert sorted(p.relative_to(root).as_posix() for p in first) == [
        f"{arm}/seed-{seed}" for arm in ("memory", "window") for seed in (0, 1)
    ]
    summary = json.loads((root / "summary.json").read_text())
    assert {arm["arm"]: arm["seeds"] for arm in summary["arms"]} == {
        "window": [0, 1],
        "memory": [0, 1],
        "broken": [],
    }
    cell = summary["arms"][0]["cells"][0]
    assert {"recall/accuracy", "recall/ceiling", "recall/beyond_window"} <= cell.keys()
    assert {"parameters", "state_bytes", "impl", "chance"} <= cell.keys()
    assert cell["impl"] == {"sliding_attention": ["chunked"]} and cell["steps"] == 2
    assert (root / "plot.png").stat().st_size > 10_000

    # Paired: the arms of one seed see the same queries; another seed sees others.
    ceilings = [[c["recall/ceiling"] for c in arm["cells"]] for arm in summary["arms"][:2]]
    assert ceilings[0] == ceilings[1] and ceilings[0][0] != ceilings[0][1]

    # TensorBoard: one experiment record at the root, a session in every finished cell.
    assert len(list(root.glob("events*.hparams"))) == 1
    assert len(list(root.glob("*/*/events*.hparams"))) == 4
    events = EventAccumulator(str(root / "window" / "seed-0")).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert {"test/recall/accuracy", "recall/accuracy"} <= {*events.Tags()["scalars"]}

    # A finished cell is never rerun; a killed one starts again, and comes to the same result.
    lost = root / "memory" / "seed-1"
    (lost / "metrics.json").unlink()
    (lost / "stale").write_text("of the killed run")
    tiny = grid_file(tmp_path)
    assert run(str(tiny), tmp_path, jobs=1) == 0
    assert "1 of 4 cells to run" in capsys.readouterr().out
    assert not (lost / "stale").exists()
    again, before = json.loads((lost / "metrics.json").read_text()), json.loads(first[lost])
    assert again["loss/held_out"] == pytest.approx(before["loss/held_out"], rel=1e-4)
    for folder in first.keys() - {lost}:
        assert (folder / "metrics.json").read_text() == first[folder]

    # Another config never overwrites, nor passes for, these results; how layers run is no config.
    other = tree["set"] | {"model.network.dim": 32}
    with pytest.raises(SpecError, match="results of another config; give another --out"):
        run(str(grid_file(tmp_path, set=other)), tmp_path, jobs=1)
    same = tree["set"] | {"model.impl": "chunked", "model.checkpoint": True}
    assert run(str(grid_file(tmp_path, set=same)), tmp_path, jobs=1) == 0


def test_claims_are_judged_and_decide_the_exit_status(tmp_path: Path, capsys: Any) -> None:
    def judged(*claims: dict[str, Any]) -> tuple[int, list[bool]]:
        path = grid_file(tmp_path, axes={"layer": {"window": narrow(8)}}, expect=list(claims))
        _, cells = load_grid(str(path))
        for cell in cells:  # as if it had run
            if prepare(cell, tmp_path / "tiny"):
                figures = {"recall/queries": 63 + 2 * cell.seed, "recall/accuracy": 0.5}
                figures |= {"recall/ceiling": 0.4, "chance": 0.1}
                sizes = {"parameters": 1, "state_bytes": 1, "length": 1}
                metrics = tmp_path / "tiny" / cell.path / "metrics.json"
                metrics.write_text(json.dumps(figures | sizes))
        status = run(str(path), tmp_path, jobs=1)
        summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
        return status, [each["holds"] for each in summary["claims"]]

    assert judged(claim()) == (0, [True])
    assert re.search(r"64.000 ±0 +64.000 +holds", capsys.readouterr().out)
    wrong, mistyped = claim(value=65, tolerance=0.5), claim(metric="recall/queriez")
    assert judged(claim(), wrong, mistyped) == (1, [True, False, False])
    out = capsys.readouterr().out
    assert re.search(r"65.000 ±0.5 +64.000 +fails", out)
    assert re.search(r"recall/queriez +64.000 ±0 +- +not measured", out)


def test_a_claim_is_about_the_mean_and_a_window_bound_of_an_arms_own_cells() -> None:
    def row(arm: str, *cells: tuple[float, float]) -> Row:
        metrics = [
            {"recall/ceiling": c, "recall/accuracy": a, "recall/queries": 99, "chance": 0.1}
            for c, a in cells
        ]
        return Row(arm, {"window": arm}, [*range(len(cells))], metrics)

    rows = [row("8", (0.4, 0.4), (0.6, 0.6)), row("16", (0.8, 0.9), (0.8, 0.9)), row("32")]
    claims = [
        Claim.from_fields(claim(arm=arm, metric="recall/accuracy", value=value, tolerance=0.06))
        for arm, value in (("8", 0.5), ("8", "window_bound"), ("16", "window_bound"), ("32", 0.5))
    ]
    verdicts = judge(claims, rows)
    # A mean ceiling of .5 and a guess among 10 are .55; of .8, .82: too far from .9.
    expected = [0.5, 0.55, 0.82, 0.5]
    assert [verdict.expected for verdict in verdicts] == pytest.approx(expected)
    assert [verdict.holds for verdict in verdicts] == [True, True, False, False]
    assert verdicts[3].measured is None
    # The table's line about one bound for all is for arms that share a ceiling.
    assert bound_of(rows) is None
    assert bound_of(rows[:1]) == pytest.approx(window_bound(0.5, 0.1, 99))


def test_a_grid_of_two_axes_is_drawn_as_a_map(tmp_path: Path, monkeypatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plotting, "heat_map", lambda axes, *rest: drawn.append(rest))
    rows = [
        Row(
            f"{task},{layer}", {"task": task, "layer": layer}, [0, 1], [{name: 0.25}, {name: 0.75}]
        )
        for task, name in (("recall", "recall/accuracy"), ("parity", "accuracy/all"))
        for layer in ("a", "b", "c")
    ]
    rows[4].metrics.clear()  # has not run
    assert plotting.plot("title", rows, None, tmp_path / "map.png")
    ((values, down, along),) = drawn
    assert (down, along) == (["recall", "parity"], ["a", "b", "c"])
    assert np.array_equal(values, [[0.5] * 3, [0.5, np.nan, 0.5]], equal_nan=True)
    assert (tmp_path / "map.png").is_file()
    assert not plotting.plot(
        "title", [Row("x", {"layer": "x"}, [], [])], None, tmp_path / "no.png"
    )


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    endless = {"trainer.max_steps": 100_000, "data.init_args.train_samples": 10_000_000}
    quick: dict[str, Any] = {"trainer.max_steps": 1, "trainer.val_check_interval": 1}
    quick["data.init_args.lengths"] = [32, 64]  # two test loaders
    axes = {"steps": {"endless": endless, "quick": quick}}
    base = yaml.safe_load(grid_file(tmp_path).read_text())["set"]
    path = grid_file(tmp_path, axes=axes, set=base, seeds=[0], window_arm=None)
    _, cells = load_grid(str(path))
    assert all(prepare(cell, tmp_path) for cell in cells)
    seen: dict[str, dict[str, Any]] = {}

    def report(cell: Any, answer: dict[str, Any]) -> None:
        seen[cell.path] = answer
        if cell.arm == "endless" and "step" in answer:
            next(iter(pool.workers)).kill()

    pool = Pool(cells, tmp_path, jobs=1, report=report)
    pool.run()
    assert seen["endless/seed-0"] == {"failed": "killed by signal 9"}
    assert seen["quick/seed-0"] == {"done": True}
    metrics = json.loads((tmp_path / "quick/seed-0/metrics.json").read_text())
    assert {f"recall/ceiling/length={n}" for n in (32, 64)} <= metrics.keys()
    assert not pool.workers
    assert prepare(cells[0], tmp_path) and not prepare(cells[1], tmp_path)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    _, cells = load_grid(str(grid_file(tmp_path)))
    precious = tmp_path / cells[0].path / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(SpecError, match="is not a cell's folder"):
        prepare(cells[0], tmp_path)
    assert precious.read_text() == "years of work"


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = str(grid_file(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"--out .*file"):
        run(path, tmp_path / "file", jobs=1)
    (tmp_path / "tiny").mkdir()
    with open(tmp_path / "tiny" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SpecError, match="another run uses it"):
            run(path, tmp_path, jobs=1)


def test_statistics() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.302653 / math.sqrt(3)), rel=1e-6)
    assert math.isnan(mean_interval([1.0]).half) and math.isnan(mean_interval([]).mean)
    assert window_bound(0.5, 0.1, 99) == pytest.approx((0.55, math.sqrt(0.55 * 0.45 / 99)))
