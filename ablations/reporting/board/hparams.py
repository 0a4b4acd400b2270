"""Makes the cells of grids comparable in TensorBoard's HPARAMS tab.

The tab takes its columns from one run's experiment record, the first that it finds. So a record
with the columns of all cells is written at the root, where it is the first, and each cell gets
the start and end of its own session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.struct_pb2 import ListValue
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard.writer import FileWriter

from ...running.folder import State
from ..arm_rows import ACCURACIES
from ..results import CellResult, GridResults

USUAL_METRICS = (*ACCURACIES, "recall/beyond_window", "loss/held_out")
USUAL_SIZES = ("parameters", "state_bytes")


def compared_metrics(results: GridResults) -> list[str]:
    """Figures: the headline, what most tasks have, and those of the scaling laws."""
    report = results.report
    headline = () if report.metric is None else (report.metric,)
    return [*dict.fromkeys((*headline, *USUAL_METRICS, *(law.y for law in report.scaling)))]


def compared_sizes(results: GridResults) -> list[str]:
    """Sizes: what all cells have, and those of the scaling laws."""
    return [*dict.fromkeys((*USUAL_SIZES, *(x for law in results.report.scaling for x in law.x)))]


# Their classes are made when they are imported, so that type checkers know none.
api: Any = api_pb2
data: Any = plugin_data_pb2
proto: Any = summary_pb2

HPARAMS_SUFFIX = ".hparams"
SESSION_STATUS: dict[State, Any] = {
    "finished": api.STATUS_SUCCESS,
    "running": api.STATUS_RUNNING,
    "diverged": api.STATUS_FAILURE,
    "failed": api.STATUS_FAILURE,
    "started": api.STATUS_UNKNOWN,
}
"""A pending cell has no events yet, and no session."""

SessionColumns = dict[str, float | str]


def write_hparams(grids: Sequence[GridResults], root: Path) -> None:
    """Write the records anew; earlier ones are removed.

    root: of the one grid, or the folder that has those of several.
    """
    for stale in root.rglob(f"events.*{HPARAMS_SUFFIX}"):
        stale.unlink(missing_ok=True)
    for grid in grids:
        for cell, columns in _sessions(grid):
            start = data.SessionStartInfo()
            for name, value in columns.items():
                if isinstance(value, str):
                    start.hparams[name].string_value = value
                else:
                    start.hparams[name].number_value = value
            end = data.SessionEndInfo(status=SESSION_STATUS[cell.state])
            _write_records(
                grid.root / cell.path,
                _summary_record(metadata.SESSION_START_INFO_TAG, session_start_info=start),
                _summary_record(metadata.SESSION_END_INFO_TAG, session_end_info=end),
            )
    for folder, inside in {**{grid.root: [grid] for grid in grids}, root: grids}.items():
        experiment = _experiment(inside)
        _write_records(folder, _summary_record(metadata.EXPERIMENT_TAG, experiment=experiment))


def _sessions(grid: GridResults) -> list[tuple[CellResult, SessionColumns]]:
    """The cells that have begun, and what each was given: its options, tuned ones too, its seeds,
    and the sizes of one that has finished. An axis has numbers if all its options are some, and a
    size if all cells have finite ones."""
    begun = [cell for cell in grid.cells if cell.state in SESSION_STATUS]
    axes = [
        {name: _number_or_text(text) for name, text in _all_options(cell).items()}
        for cell in begun
    ]
    words = {name for row in axes for name, value in row.items() if isinstance(value, str)}
    known = {
        name: [c.metrics[name] for c in begun if name in c.metrics]
        for name in compared_sizes(grid)
    }
    words |= {name for name, values in known.items() if not all(map(math.isfinite, values))}
    found = []
    for cell, row in zip(begun, axes, strict=True):
        given = {n: cell.metrics[n] for n in compared_sizes(grid) if n in cell.metrics}
        columns: SessionColumns = {n: str(x) if n in words else x for n, x in given.items()}
        columns |= {"seed": str(cell.seed)}
        columns |= row | {n: text for n, text in _all_options(cell).items() if n in words}
        found.append((cell, columns))
    return found


def _all_options(cell: CellResult) -> dict[str, str]:
    return {**cell.options, **cell.tuned}


def _number_or_text(option: str) -> float | str:
    """An option, as 1e-3 or conv=3, as a number if it is one."""
    try:
        value = float(option.rpartition("=")[2])
    except ValueError:
        return option
    return value if math.isfinite(value) else option


def _experiment(grids: Sequence[GridResults]) -> Any:
    """What the columns are: the union over all cells."""
    sessions = [session for grid in grids for session in _sessions(grid)]
    values: dict[str, dict[float | str, None]] = {}
    for _, columns in sessions:
        for name, value in columns.items():
            values.setdefault(name, {})[value] = None
    tags = dict.fromkeys(name for grid in grids for name in compared_metrics(grid))
    measured = {name for cell, _ in sessions for name in cell.metrics}
    return api.Experiment(
        hparam_infos=[_column_info(name, [*found]) for name, found in values.items()],
        metric_infos=[
            api.MetricInfo(name=api.MetricName(tag=f"test/{name}"))
            for name in tags
            if name in measured
        ],
    )


def _column_info(name: str, values: Sequence[float | str]) -> Any:
    """Of a column; one of words has a list to choose from, one of numbers a range."""
    words = [value for value in values if isinstance(value, str)]
    domain = ListValue()
    domain.extend(words)
    return api.HParamInfo(
        name=name,
        type=api.DATA_TYPE_STRING if words else api.DATA_TYPE_FLOAT64,
        domain_discrete=domain if len(words) == len(values) else None,
        differs=len(values) > 1,
    )


def _summary_record(tag: str, **content: Any) -> Any:
    about = metadata.create_summary_metadata(data.HParamsPluginData(**content))
    return proto.Summary(
        value=[proto.Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)]
    )


def _write_records(folder: Path, *records: Any) -> None:
    writer = FileWriter(str(folder), filename_suffix=HPARAMS_SUFFIX)
    for record in records:
        writer.add_summary(record)
    writer.close()
