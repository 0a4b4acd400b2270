"""Every cell as a line of a table: results.csv, results.parquet."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pandas as pd

from .results import CellResult, GridResults


def write_cell_table(results: GridResults, folder: Path) -> list[Path]:
    """Write the cells as CSV, and as Parquet if pyarrow is there. Floats are in full precision; in
    CSV nan and inf are words, and what there is not is empty."""
    lines = _cell_lines(results)
    frame = pd.DataFrame(lines)
    csv, parquet = folder / "results.csv", folder / "results.parquet"
    words = [{name: _nan_as_word(value) for name, value in line.items()} for line in lines]
    told = {name: pd.array([line[name] for line in words], dtype=object) for name in frame}
    pd.DataFrame(told).to_csv(csv, index=False, lineterminator="\n")
    if importlib.util.find_spec("pyarrow") is None:
        return [csv]
    frame.to_parquet(parquet, index=False)
    return [csv, parquet]


def _nan_as_word(value: Any) -> Any:
    """nan as a word: pandas would write nothing."""
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def _cell_lines(results: GridResults) -> list[dict[str, Any]]:
    """All with the same columns: axes in the grid's order, figures by name."""
    axes = [*dict.fromkeys(axis for arm in results.arms.values() for axis in arm)]
    tuned = [*dict.fromkeys(axis for cell in results.cells for axis in cell.tuned)]
    names = sorted({name for cell in results.cells for name in cell.metrics})
    return [_cell_line(cell, axes, tuned, names) for cell in results.cells]


def _cell_line(
    cell: CellResult, axes: list[str], tuned: list[str], names: list[str]
) -> dict[str, Any]:
    return {
        "arm": cell.arm,
        **{f"axis:{axis}": cell.options.get(axis) for axis in axes},
        "seed_init": cell.seed.init,
        "seed_data": cell.seed.data,
        "state": cell.state,
        "path": cell.path,
        **{f"tuned:{axis}": cell.tuned.get(axis) for axis in tuned},
        "matched:deviation": cell.matched.get("deviation"),
        **{name: cell.metrics.get(name) for name in names},
    }
