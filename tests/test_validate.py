"""`layerzoo ablate validate`: which references run, how they are judged, and the exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerzoo import SpecError
from layerzoo.ablations import validate as validation
from layerzoo.ablations.cells import grid as grids
from layerzoo.ablations.cells.cell import Seed
from layerzoo.ablations.cells.claims import Claim
from layerzoo.ablations.command import main
from layerzoo.ablations.grid_run import RunOptions
from layerzoo.ablations.reporting.arm_rows import ArmRow
from layerzoo.ablations.reporting.comparisons import judge_claims
from layerzoo.ablations.reporting.results import CellResult
from layerzoo.ablations.running.folder import METRICS, cell_facts, prepare_folder

from .here import quick

LAYERS = {"window": {"name": "sliding", "heads": 2, "window": 8}, "memory": {"name": "linear"}}

ONE = {"axes": {"layer": {"window": {"model.network.layers": [LAYERS["window"]]}}}, "seeds": [0]}
"""What makes a grid of one cell."""


def claim(arm: str = "window", value: float | str = 0.4, **changes: Any) -> dict[str, Any]:
    fields = {"arm": arm, "metric": "recall/accuracy", "value": value, "tolerance": 0.1}
    return {**fields, "source": "a paper", **changes}


class Shipped:
    """Tiny grids in the place of the shipped ones, and a folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder / "grids", folder / "out"
        self.folder.mkdir()

    def files(self) -> dict[str, Path]:
        return {path.stem: path for path in sorted(self.folder.glob("*.yaml"))}

    def add(self, name: str, minutes: float | None, *claims: dict[str, Any], **more: Any) -> None:
        fields = {
            "name": name,
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
                "layer": {arm: {"model.network.layers": [spec]} for arm, spec in LAYERS.items()}
            },
            "seeds": [0, 1],
            "expect": [*claims],
            **({} if minutes is None else {"minutes": minutes}),
            **more,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))

    def measured(self, name: str, **accuracy: float) -> None:
        """As if the grid had run, with these figures by arm; its seeds are .02 apart."""
        for cell in grids.load_grid(name).cells():
            value = accuracy[cell.arm] + 0.01 * (-1) ** cell.seed.init
            sizes = {"parameters": 1, "state_bytes": 1, "length": 1}
            path = prepare_folder(cell, self.out / name) / METRICS
            path.write_text(json.dumps({"recall/accuracy": value} | sizes))

    def validate(self, *options: str) -> int:
        return main(["validate", *options, "--out", str(self.out), "--jobs", "1"])


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shipped]:
    out = Shipped(tmp_path)
    for module in (grids, validation):
        monkeypatch.setattr(module, "shipped_grids", out.files)
    with quick():
        yield out


def test_references_are_judged_in_one_table(shipped: Shipped, capsys: Any) -> None:
    shipped.add("bound", 1, claim(), claim("memory", 0.8, tolerance=0.05))
    shipped.add("sign", 2, claim("memory", 0.17, minus="window", tolerance="sign"))
    shipped.add("silent", 1)  # claims nothing
    shipped.measured("bound", window=0.45, memory=0.8)
    shipped.measured("sign", window=0.2, memory=0.3)
    assert shipped.validate() == 0
    out = capsys.readouterr().out
    assert "bound: 0 of 4 cells to run" in out and "silent" not in out and "skipped" not in out
    assert re.search(r"bound +window +recall/accuracy +0.400 +0.450 +±0.1 +holds", out)
    assert re.search(r"  memory +recall/accuracy +0.800 +0.800 +±0.05 +holds", out)
    assert re.search(r"sign +memory - window +recall/accuracy +\+0.170 +\+0.100 +sign +holds", out)
    assert out.count("holds") == 3, "no verdict is printed twice"
    # One claim that fails is enough.
    shipped.measured("bound", window=0.45, memory=0.7)
    assert shipped.validate() == 1
    out = capsys.readouterr().out
    assert re.search(r"  memory +recall/accuracy +0.800 +0.700 +±0.05 +fails", out)
    assert (out.count("holds"), out.count("fails")) == (2, 1)
    assert shipped.validate("sign") == 0
    assert "bound" not in capsys.readouterr().out


def test_cells_that_no_claim_is_about_are_named(
    shipped: Shipped, capsys: Any, monkeypatch: Any
) -> None:
    shipped.add("bound", 1, claim())
    shipped.measured("bound", window=0.4, memory=0.4)
    monkeypatch.setattr(validation, "run_grid", lambda name, how, tables: 0)
    grid, root = grids.load_grid("bound"), shipped.out / "bound"
    for cell in grid.cells():
        folder = root / cell.path
        if cell.seed.init == 0:  # .41
            (folder / METRICS).unlink()
            name = "diverged" if cell.arm == "window" else "failed"
            (folder / f"{name}.json").write_text(json.dumps({"reason": f"it {name}"}))
    listed = [{"path": cell.path, **cell_facts(cell)} for cell in grid.cells()]
    (root / "cells.json").write_text(json.dumps(listed))
    (root / "grid.yaml").write_text(grid.source.copy)
    assert shipped.validate() == 0
    out = capsys.readouterr().out
    assert re.search(r"bound +window +recall/accuracy +0.400 +0.390 +±0.1 +holds", out)
    assert re.search(r"bound: without window/seed-0-\w+: diverged: it diverged\n", out)
    assert re.search(r"bound: without memory/seed-0-\w+: failed: it failed\n", out)


def test_long_references_are_skipped_unless_asked_for(shipped: Shipped, capsys: Any) -> None:
    long = {"long": (10.1, "10 min"), "longer": (4320, "3 days"), "unsaid": (None, "?")}
    shipped.add("brief", 10, claim(), **ONE)
    for name, (minutes, _) in long.items():
        shipped.add(name, minutes, claim(value=0.9), **ONE)
    for name in ("brief", *long):
        shipped.measured(name, window=0.4, memory=0.4)
    assert shipped.validate() == 0
    out = capsys.readouterr().out
    for name, (_, time) in long.items():
        assert re.search(rf"{name} +{re.escape(time)} +layerzoo ablate validate {name}", out)
        assert f"{name}: " not in out, "it did not run"
    assert out.index("holds") < out.index("skipped: longer than 10 min on 2 CPU cores")
    each = (["unsaid", "long"], 2), (["--all"], 4), (["brief", "long", "long"], 2)
    for options, ran in each:
        assert shipped.validate(*options) == 1
        out = capsys.readouterr().out
        assert "skipped" not in out and out.count("0 of 1 cells to run") == ran
        assert re.search(r"long +window +recall/accuracy +0.900 +0.410 +±0.1 +fails", out)


@pytest.mark.slow
def test_a_reference_is_trained_and_failed_cells_are_no_success(
    shipped: Shipped, capsys: Any
) -> None:
    steps = claim(value=2.0, metric="steps", tolerance=0)
    broken = {"model.network.layers": ["mesa"], "model.impl": "triton"}  # has no kernel
    window = {"model.network.layers": [LAYERS["window"]]}
    shipped.add("fine", 1, steps, axes={"layer": {"window": window}}, seeds=[0])
    shipped.add("half", 99, steps, axes={"layer": {"window": window, "broken": broken}}, seeds=[0])
    assert shipped.validate() == 0
    assert "fine: 1 of 1 cells to run" in capsys.readouterr().out
    assert shipped.validate("half") == 1
    out, err = capsys.readouterr()
    assert "holds" in out and "fails" not in out and "failed: broken/seed-0" in err


@pytest.mark.parametrize(
    ("ends", "accuracy", "status", "ran"),
    [
        ((0, 0), 0.4, 0, 2),
        ((0, 1), 0.4, 1, 2),  # cells failed
        ((0, 0), 0.9, 1, 2),  # a claim does not hold, though the run thinks that there is none
        ((130, 0), 0.4, 130, 1),
    ],
)
def test_how_a_grid_ends_counts(
    shipped: Shipped,
    monkeypatch: Any,
    ends: tuple[int, ...],
    accuracy: float,
    status: int,
    ran: int,
) -> None:
    runs = []
    for name in ("a", "b"):
        shipped.add(name, 1, claim(), **ONE)
        shipped.measured(name, window=accuracy, memory=0.4)
    real = validation.run_grid

    def run(name: str, how: RunOptions, tables: bool) -> int:
        real(name, how, tables=tables)
        runs.append(name)
        return ends[len(runs) - 1]

    monkeypatch.setattr(validation, "run_grid", run)
    assert shipped.validate() == status
    assert len(runs) == ran


def test_wrong_uses_are_refused_before_anything_runs(shipped: Shipped) -> None:
    shipped.add("one", 1, claim())
    shipped.add("silent", 1)
    for options, message in (
        (["one", "silent"], "grid silent: claims nothing (no expect); references: one"),
        (["one", "onne"], "no grid 'onne'; did you mean 'one'?"),
        (["one", "--all"], "--all: runs every reference; drop it, or the names"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
    ):
        with pytest.raises(SpecError) as error:
            main(["validate", *options])
        assert message in str(error.value)
    assert not shipped.out.exists()


DIFFERENCES = [
    # expected, tolerance, of the two arms measured, holds
    (0.2, 0.05, (0.5, 0.26), True),
    (0.2, 0.05, (0.26, 0.5), False),
    (0.2, 0.05, (0.5, 0.2), False),
    (-0.1, "sign", (0.2, 0.9), True),
    (-0.1, "sign", (0.9, 0.2), False),
    (0.1, "sign", (0.9, 0.2), True),
    (0.1, "sign", (0.5, 0.5), False),
    (-0.1, "sign", (0.5, 0.5), False),
    (0.1, "sign", (0.5, None), False),
    (0.1, "sign", (None, 0.5), False),
]


@pytest.mark.parametrize(("value", "tolerance", "measured", "holds"), DIFFERENCES)
def test_a_claim_of_a_difference_is_of_the_means(
    value: float, tolerance: float | str, measured: tuple[float | None, ...], holds: bool
) -> None:
    each = claim("memory", value, minus="window", tolerance=tolerance)
    rows = []
    for arm, x in zip(("memory", "window"), measured, strict=True):
        values = [] if x is None else [x - 0.25, x + 0.25]
        found = [
            CellResult(arm, {}, Seed(n, n), "", "finished", {each["metric"]: value}, {}, {})
            for n, value in enumerate(values)
        ]
        rows.append(ArmRow(arm, {}, found))
    (verdict,) = judge_claims([Claim.from_fields(each)], rows)
    assert verdict.holds is holds and verdict.expected == value
    first, second = measured
    if first is None or second is None:
        assert verdict.measured is None and verdict.word == "not measured"
    else:
        assert verdict.measured == pytest.approx(first - second)


def test_shipped_references_say_how_long_they_take() -> None:
    references = validation.grids_with_claims()
    assert references
    for name, grid in references.items():
        assert grid.name == name and grid.fields.minutes is not None
        told = f"layerzoo ablate validate {name}" in grid.source.text
        assert told or grid.fields.minutes <= 10, name
