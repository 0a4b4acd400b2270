"""Makes a grid's cells comparable in TensorBoard's HPARAMS tab.

The tab takes the list of columns from one run's experiment record. So one record with the union
of all columns is written at the grid's root, and each cell gets its start and end alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import FileWriter

from .rows import Row

SUFFIX = ".hparams"
COLUMNS = (
    "recall/accuracy",
    "recall/beyond_window",
    "recall/ceiling",
    "accuracy/all",
    "loss/held_out",
)


def write_hparams(rows: Sequence[Row], out: Path) -> None:
    """Write the records anew; earlier ones are removed."""
    for stale in out.rglob(f"events.*{SUFFIX}"):
        stale.unlink()
    finished = [cell for row in rows for cell in row.cells]
    if not finished:
        return
    seen = {name for cell in finished for name in cell.metrics}
    columns = {f"test/{name}": 0.0 for name in COLUMNS if name in seen}
    domain: dict[str, list[bool | float | str]] = {}
    for cell in finished:
        for axis, option in cell.options.items():
            options = domain.setdefault(axis, [])
            if option not in options:
                options.append(option)
    for n, cell in enumerate(finished):
        values = {
            **cell.options,
            "seed": cell.seed.init,
            "parameters": cell.metrics["parameters"],
            "state_bytes": cell.metrics["state_bytes"],
        }
        experiment, start, end = hparams(values, columns, domain)
        if n == 0:
            _write(out, experiment)
        _write(out / cell.path, start, end)


def _write(folder: Path, *records: object) -> None:
    writer = FileWriter(str(folder), filename_suffix=SUFFIX)
    for record in records:
        writer.add_summary(record)
    writer.close()
