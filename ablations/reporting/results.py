"""What a grid's folder of results holds, read from the disk alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerzoo.spec import SpecError
from layerzoo.support.json_files import floats

from ..cells.arms import Arm, arm_name, passes, read_arm_filter, read_arms
from ..cells.axes import Axis, read_axes
from ..cells.cell import Seed
from ..cells.claims import Claim, read_claims
from ..cells.grid import grid_name
from ..cells.report_options import Report, read_report
from ..cells.schema import Fields
from ..cells.source import Source
from ..running.folder import CELLS, CONFIG, ENDED, METRICS, RECORD, State, read_json
from ..running.status import read_listed_cells

GRID_FILE = "grid.yaml"
"""In the grid's folder: a copy of its file."""


@dataclass(frozen=True)
class CellResult:
    """A cell, as its folder has it.

    metrics: figures of its held-out split and sizes; {} unless it has finished.
    """

    arm: str
    options: dict[str, str]
    seed: Seed
    path: str
    state: State
    metrics: Mapping[str, Any]
    tuned: dict[str, str]
    matched: dict[str, Any]


@dataclass(frozen=True)
class GridResults:
    """Of a grid: what it asks, and what its cells found so far.

    question: the first line of its file. fields: of its file. axes: also those of tuning, in
    `tuning`. arms: all that it has, also those that have no cells, because they are not tuned.
    windows: of these the window arms. cells: in the grid's order, seed by seed. trials: the tuning
    runs.
    """

    root: Path
    name: str
    question: str
    fields: Fields
    axes: dict[str, Axis]
    tuning: dict[str, Axis]
    arms: dict[str, Arm]
    windows: list[str]
    report: Report
    claims: list[Claim]
    cells: list[CellResult]
    trials: list[CellResult]

    def config(self, cell: CellResult) -> dict[str, Any]:
        """Of its training.

        Raises:
            SpecError: it is lost.
        """
        path = self.root / cell.path / CONFIG
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SpecError(f"{path}: is lost; `layerzoo ablate run` writes it anew") from None

    def record(self, cell: CellResult) -> dict[str, Any]:
        """Versions, commit, device, seconds; {} unless it has finished."""
        return read_json(self.root / cell.path / RECORD)

    @property
    def ended(self) -> bool:
        """Whether no cell is left to run."""
        return not self.waiting and all(cell.state in ENDED for cell in self.cells)

    @property
    def waiting(self) -> list[str]:
        """The arms that have no cells yet, for some of their tuning runs have not ended."""
        left = {cell.arm for cell in self.trials if cell.state not in (*ENDED, "failed")}
        return [arm for arm in self.without_cells if arm in left]

    @property
    def without_cells(self) -> list[str]:
        known = {cell.arm for cell in self.cells}
        return [arm for arm in self.arms if arm not in known]


def read_results(root: Path) -> GridResults:
    """The results in a grid's folder, also while it runs.

    Raises:
        SpecError: it is no grid's folder, or an arm's finished cells are of different data.
    """
    listed = read_listed_cells(root)
    source = Source(root / GRID_FILE)
    with source.locating():
        fields: Fields = Fields.from_fields(source.tree)
    axes = read_axes(source, "axes")
    arms = read_arms(source, axes, fields.design)
    names = [arm_name(arm) for arm in arms]
    where = read_arm_filter(source, axes, "window_arm") if fields.window_arm else None
    splits: dict[str, list[CellResult]] = {"test": [], "val": []}
    for cell in listed:
        splits[cell["split"]].append(_cell_result(root, cell))
    _refuse_mixed(root, splits["test"])
    return GridResults(
        root=root,
        name=grid_name(source),
        question=source.question,
        fields=fields,
        axes=axes,
        tuning=read_axes(source, "tune", "axes") if fields.tune else {},
        arms=dict(zip(names, arms, strict=True)),
        windows=[] if where is None else [arm_name(arm) for arm in arms if passes(arm, where)],
        report=Report() if fields.report is None else read_report(source, axes, arms),
        claims=read_claims(source, names),
        cells=splits["test"],
        trials=splits["val"],
    )


def _refuse_mixed(root: Path, cells: list[CellResult]) -> None:
    """A mean over cells that were trained on different data is of nothing."""
    first: dict[str, tuple[str, dict[str, str]]] = {}
    for cell in cells:
        if cell.state != "finished":
            continue
        digest = read_json(root / cell.path / RECORD).get("digest", {})
        path, other = first.setdefault(cell.arm, (cell.path, digest))
        if digest != other:
            name = min(n for n in {**other, **digest} if other.get(n) != digest.get(n))
            raise SpecError(
                f"{root}: arm {cell.arm}: its cells were trained on different data ({name}: "
                f"{other.get(name, 'unknown')[:12]} in {path}, "
                f"{digest.get(name, 'unknown')[:12]} in {cell.path}); remove those of one "
                f"and run the grid again"
            )


def read_all_results(root: Path) -> list[GridResults]:
    """The results in a grid's folder, or in every grid's folder in a folder.

    Raises:
        SpecError: there are none.
    """
    below = [] if (root / CELLS).is_file() else sorted(root.glob(f"*/{CELLS}"))
    return [read_results(path.parent) for path in below] or [read_results(root)]


def _cell_result(root: Path, cell: Mapping[str, Any]) -> CellResult:
    return CellResult(
        arm=cell["arm"],
        options=cell["options"],
        seed=Seed(**cell["seed"]),
        path=cell["path"],
        state=cell["state"],
        metrics=floats(read_json(root / cell["path"] / METRICS)),
        tuned=cell["tuned"],
        matched=cell["matched"],
    )
