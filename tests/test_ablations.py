"""Grids: cells, pairing, resuming, failing, reporting."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo import SpecError
from layerzoo.ablations import grid_run as command
from layerzoo.ablations.cells.cell import Seed
from layerzoo.ablations.cells.claims import Claim
from layerzoo.ablations.cells.grid import load_grid
from layerzoo.ablations.command import main
from layerzoo.ablations.grid_run import RunOptions, run_grid
from layerzoo.ablations.reporting.arm_rows import (
    ArmRow,
    differences_by_seed,
    rows_by_arm,
    rows_by_axes,
)
from layerzoo.ablations.reporting.comparisons import judge_claims
from layerzoo.ablations.reporting.findings import shared_window_bound
from layerzoo.ablations.reporting.results import CellResult
from layerzoo.ablations.reporting.statistics import mean_interval, window_bound
from layerzoo.ablations.running.folder import METRICS, RECORD, prepare_folder
from layerzoo.train.command import main as train

from .here import Here, quick


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(command, "LocalExecutor", Here)
    monkeypatch.setattr(Here, "made", [])
    with quick():
        yield


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


def layers(*specs: Any) -> dict[str, Any]:
    return {"model.network.layers": list(specs)}


def go(path: Path, out: Path, **how: Any) -> int:
    return run_grid(str(path), RunOptions(out=out, **how))


def metrics_of(root: Path) -> dict[str, str]:
    """The figures of the finished cells, by arm and seed."""
    found = sorted(root.rglob("metrics.json"))
    return {p.parent.relative_to(root).as_posix()[:-9]: p.read_text() for p in found}


def test_a_grid_runs_resumes_and_reports(tmp_path: Path, capsys: Any) -> None:
    broken = {"model.network.layers": ["mesa"], "model.impl": "triton"}  # it has no kernel
    tree = yaml.safe_load(grid_file(tmp_path).read_text())
    path = grid_file(tmp_path, axes={"layer": {**tree["axes"]["layer"], "broken": broken}})
    assert go(path, tmp_path, jobs=2, retries=0, every=0) == 1
    assert Here.made == [(2, 1, 0)]
    out, err = capsys.readouterr()
    assert "6 of 6 cells to run" in out
    assert "failed: broken/seed-0-" in err and "no Triton kernel yet" in err
    root = tmp_path / "tiny"
    first = metrics_of(root)
    assert [*first] == [f"{arm}/seed-{seed}" for arm in ("memory", "window") for seed in (0, 1)]
    summary = json.loads((root / "report" / "summary.json").read_text())
    assert {arm["arm"]: arm["seeds"] for arm in summary["arms"]} == {
        "window": ["0", "1"],
        "memory": ["0", "1"],
        "broken": [],
    }
    cell = summary["arms"][0]["cells"][0]
    assert {"recall/accuracy", "recall/ceiling", "recall/beyond_window"} <= cell.keys()
    assert {"parameters", "state_bytes", "chance"} <= cell.keys() and cell["steps"] == 2
    folder = root / summary["arms"][0]["folders"][0]
    record = json.loads((folder / "record.json").read_text())
    assert record["impl"] == {"sliding_attention": ["chunked"]} and record["seconds"] > 0
    assert {"layerzoo", "torch", "lightning", "python", "commit"} <= record["versions"].keys()
    text = (root / "report" / "report.md").read_text()
    assert "**Partial: 2 of 6 cells have no result yet.**" in text
    assert re.search(r"\| broken \| 0 \| failed \| .*no Triton kernel yet", text)

    # Paired: the arms of one seed see the same queries; another seed sees others.
    ceilings = [[c["recall/ceiling"] for c in arm["cells"]] for arm in summary["arms"][:2]]
    assert ceilings[0] == ceilings[1] and ceilings[0][0] != ceilings[0][1]

    # TensorBoard: one experiment record at the root, a session in every cell that has begun.
    assert len(list(root.glob("events*.hparams"))) == 1
    assert len(list(root.glob("*/*/events*.hparams"))) == 6
    events = EventAccumulator(str(folder)).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert {"test/recall/accuracy", "recall/accuracy"} <= {*events.Tags()["scalars"]}

    # What is where, from the disk alone.
    assert main(["status", str(root)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"all +6 +4 +2", out) and "failed: broken/seed-0" in out
    with pytest.raises(SpecError, match=f"give one of {root}"):
        main(["status", str(tmp_path)])

    # A finished cell is never run again; a lost one is, and comes to the same result.
    lost = root / summary["arms"][1]["folders"][1]
    shutil.rmtree(lost)
    tiny = grid_file(tmp_path)
    assert go(tiny, tmp_path, jobs=1) == 0
    assert "1 of 4 cells to run" in capsys.readouterr().out
    assert metrics_of(root) == first
    assert main(["status", str(root), "--json"]) == 0
    assert {cell["state"] for cell in json.loads(capsys.readouterr().out)} == {"finished"}

    # Another config has folders of its own; how layers run is no config.
    same = tree["set"] | {"model.impl": "chunked", "model.checkpoint": True}
    assert go(grid_file(tmp_path, set=same), tmp_path) == 0
    assert "0 of 4 cells to run" in capsys.readouterr().out
    other = tree["set"] | {"model.network.dim": 32}
    assert go(grid_file(tmp_path, set=other), tmp_path, jobs=1, limit=1) == 0
    out = capsys.readouterr().out
    assert "1 of 4 cells to run" in out and re.search(r"window +1/2", out)
    assert len([*root.rglob("metrics.json")]) == 5

    # A cell is an ordinary run: its config alone makes it again.
    rerun = tmp_path / "rerun"
    where = ("save_dir", str(rerun)), ("name", ""), ("version", "")
    options = [x for n, v in where for x in (f"--trainer.logger.init_args.{n}", v)]
    assert train(["fit", "--config", str(folder / "config.yaml"), *options]) == 0
    (mine,) = (folder / "checkpoints").glob("*.ckpt")  # the last alone
    ours, theirs = (
        torch.load(p, weights_only=True)["state_dict"]
        for p in (mine, rerun / "checkpoints" / "last.ckpt")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_arm_is_tuned_on_other_seeds_and_the_validation_split(
    tmp_path: Path, capsys: Any
) -> None:
    tree = yaml.safe_load(grid_file(tmp_path).read_text())
    tune = {"axes": {"model.lr": [1e-9, 1e-2]}, "seeds": [7, 8], "budget": 12}
    path = grid_file(
        tmp_path,
        tune=tune,
        seeds=[0],
        axes={"layer": {"window": tree["axes"]["layer"]["window"]}},
        set=tree["set"] | {"data.init_args.val_samples": 4},
    )
    assert go(path, tmp_path, jobs=1, limit=3) == 0
    assert "window: is not tuned yet, its cells wait" in capsys.readouterr().out
    assert go(path, tmp_path, jobs=1) == 0
    out = capsys.readouterr().out
    assert "1 of 4 cells to run" in out and "window: tuned to lr=0.01" in out
    root = tmp_path / "tiny"
    trials = json.loads((root / "tuning.json").read_text())["window"]["trials"]
    assert [trial["options"]["model.lr"] for trial in trials] == ["lr=1e-09", "lr=0.01"]
    for metrics in (json.loads(p.read_text()) for p in root.glob("tune/*/*/*/metrics.json")):
        assert metrics["steps"] == 12 and metrics["recall/queries"] == 4 * 8
    (cell,) = root.glob("window/*/config.yaml")
    config = yaml.safe_load(cell.read_text())
    assert config["model"]["lr"] == 0.01 and config["trainer"]["max_steps"] == 2


def cell(arm: str, seed: int, **options: str) -> CellResult:
    """A cell that has not run."""
    return CellResult(arm, options, Seed(seed, seed), "", "pending", {}, {}, {})


def ended(arm: str, options: dict[str, str], *metrics: dict[str, float]) -> list[CellResult]:
    """Cells of an arm, with seeds 0, 1, .., each as it finished; {} diverged."""
    return [
        replace(cell(arm, n, **options), state="finished" if found else "diverged", metrics=found)
        for n, found in enumerate(metrics)
    ]


def test_claims_are_judged_and_decide_the_exit_status(tmp_path: Path, capsys: Any) -> None:
    def judged(*claims: dict[str, Any]) -> tuple[int, list[bool]]:
        path = grid_file(tmp_path, axes={"layer": {"window": narrow(8)}}, expect=list(claims))
        for cell in load_grid(str(path)).cells():  # as if it had run
            figures = {"recall/queries": 63 + 2 * cell.seed.init, "recall/accuracy": 0.5}
            figures |= {"recall/ceiling": 0.4, "chance": 0.1}
            sizes = {"parameters": 1, "state_bytes": 1, "length": 1}
            metrics = prepare_folder(cell, tmp_path / "tiny") / METRICS
            metrics.write_text(json.dumps(figures | sizes))
        status = go(path, tmp_path)
        summary = json.loads((tmp_path / "tiny" / "report" / "summary.json").read_text())
        return status, [each["holds"] for each in summary["claims"]]

    assert judged(claim()) == (0, [True])
    assert re.search(r"64.000 ±0 +64.000 +holds", capsys.readouterr().out)
    wrong, mistyped = claim(value=65, tolerance=0.5), claim(metric="recall/queriez")
    assert judged(claim(), wrong, mistyped) == (1, [True, False, False])
    out = capsys.readouterr().out
    assert re.search(r"65.000 ±0.5 +64.000 +fails", out)
    assert re.search(r"recall/queriez +64.000 ±0 +- +not measured", out)


def test_a_part_of_a_grid_fails_no_claim(tmp_path: Path, capsys: Any) -> None:
    path = grid_file(tmp_path, expect=[claim(value=65)])
    cell, *_ = load_grid(str(path)).cells()
    sizes = {"parameters": 1, "state_bytes": 1, "length": 1}
    metrics = prepare_folder(cell, tmp_path / "tiny") / METRICS
    metrics.write_text(json.dumps({"recall/queries": 64} | sizes))
    assert go(path, tmp_path, limit=0) == 0
    assert re.search(r"65.000 ±0 +64.000 +fails", capsys.readouterr().out)


def test_doubts_are_told(tmp_path: Path, capsys: Any) -> None:
    path = grid_file(tmp_path, report={"metric": "loss/heldout"})
    for cell in load_grid(str(path)).cells():  # as if it had run, one arm on another commit
        folder = prepare_folder(cell, tmp_path / "tiny")
        sizes = {"parameters": 1, "state_bytes": 1, "length": 1}
        (folder / METRICS).write_text(json.dumps({"loss/held_out": 1.0} | sizes))
        versions = {"layerzoo": "0.1", "commit": cell.arm, "torch": "2"}
        (folder / RECORD).write_text(json.dumps({"versions": versions, "seconds": 1}))
    assert go(path, tmp_path) == 0
    out = capsys.readouterr().out
    assert "warning: cells ran with different commit: memory, window" in out
    assert "different torch" not in out and "different layerzoo" not in out
    assert "warning: no cell measured 'loss/heldout'; did you mean 'loss/held_out'?" in out


def test_a_claim_is_about_the_mean_and_a_window_bound_of_an_arms_own_cells() -> None:
    def row(arm: str, *cells: tuple[float, float]) -> ArmRow:
        metrics = [
            {"recall/ceiling": c, "recall/accuracy": a, "recall/queries": 99, "chance": 0.1}
            for c, a in cells
        ]
        return ArmRow(arm, {"window": arm}, ended(arm, {"window": arm}, *metrics))

    rows = [row("8", (0.4, 0.4), (0.6, 0.6)), row("16", (0.8, 0.9), (0.8, 0.9)), row("32")]
    claims = [
        Claim.from_fields(claim(arm=arm, metric="recall/accuracy", value=value, tolerance=0.06))
        for arm, value in (("8", 0.5), ("8", "window_bound"), ("16", "window_bound"), ("32", 0.5))
    ]
    verdicts = judge_claims(claims, rows)
    # A mean ceiling of .5 and a guess among 10 are .55; of .8, .82: too far from .9.
    expected = [0.5, 0.55, 0.82, 0.5]
    assert [verdict.expected for verdict in verdicts] == pytest.approx(expected)
    assert [verdict.holds for verdict in verdicts] == [True, True, False, False]
    assert verdicts[3].measured is None
    (untuned,) = judge_claims([Claim.from_fields(claim(arm="64"))], rows)
    assert untuned.measured is None and not untuned.holds
    # The table's line about one bound for all is for arms that share a ceiling.
    assert shared_window_bound(rows) is None
    assert shared_window_bound(rows[:1]) == pytest.approx(window_bound(0.5, 0.1, 99))


def test_contrasts_are_paired_and_groups_count_seeds() -> None:
    name = "loss/held_out"

    def arm(layer: str, size: str, *values: float | None) -> list[CellResult]:
        found = [{} if value is None else {name: value} for value in values]
        return ended(f"{layer},{size}", {"layer": layer, "size": size}, *found)

    cells = [
        *arm("a", "s", 1.0, 2.0, 7.0),
        *arm("a", "m", 3.0, 5.0, None),
        *arm("b", "s", None, 1.5, 2.5),
        *arm("b", "m", 0.5, 2.5, 0.0),
    ]
    assert differences_by_seed(cells, [("a,m", "a,s")], name) == [2.0, 3.0]
    assert differences_by_seed(cells, [("a,s", "b,s")], name) == [0.5, 4.5]
    # Of several pairs the mean, at seeds that all of them have.
    assert differences_by_seed(cells, [("a,s", "b,s"), ("a,m", "b,m")], name) == [(0.5 + 2.5) / 2]
    # A group has a value a seed, the mean over its arms; without a seed that one of them lacks.
    a, b = rows_by_axes(cells, ["layer"], name)
    assert (a.arm, a.options, a.headline) == ("a", {"layer": "a"}, name)
    assert a.values(name) == [2.0, 3.5] and b.values(name) == [2.0, 1.25]
    assert (a.planned, a.diverged, len(a.cells)) == (6, 1, 4)
    assert [row.values(name) for row in rows_by_arm(cells, name)][:2] == [
        [1.0, 2.0, 7.0],
        [3.0, 5.0],
    ]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"--out .*file"):
        go(grid_file(tmp_path), tmp_path / "file")


def test_statistics() -> None:
    want = (2, 4.302653 / math.sqrt(3), 3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx(want, rel=1e-6)
    assert math.isnan(mean_interval([1.0]).half) and math.isnan(mean_interval([]).mean)
    assert window_bound(0.5, 0.1, 99) == pytest.approx((0.55, math.sqrt(0.55 * 0.45 / 99)))
