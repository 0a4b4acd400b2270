"""How held-out figures are shown: a table, curves and heat maps, on screen and in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerzoo.data.task import Task


class HeldOutFigures(Callback):
    """Draws the curves and heat maps of the held-out figures into TensorBoard's images when
    training ends; after `validate` and `test` also prints their table, logs it as text, and saves
    the pictures beside the logs."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.last: dict[str, float] = {}  # a resumed run loads its own after

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last = state_dict["last"]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._draw(trainer, "", self.last, None)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._show(trainer, "val", prefix="")
        elif not trainer.sanity_checking:
            self.last = _figures(trainer, "")
            self.last.pop("tokens/s", None)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._show(trainer, "test", prefix="test/")

    def _show(self, trainer: Any, split: str, prefix: str) -> None:
        folder = trainer.log_dir  # asks every rank
        if not trainer.is_global_zero:
            return
        figures, task = _figures(trainer, prefix), trainer.datamodule
        parts = [*task.parts(split)] if isinstance(task, Task) else [""]
        rows = table(figures, parts)
        heads = [split, *(("mean", *parts) if len(parts) > 1 else ("",))]
        show(rows, heads)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text(f"{prefix}figures", markdown(rows, heads))
        self._draw(trainer, prefix, figures, folder)

    def _draw(
        self, trainer: Any, prefix: str, figures: Mapping[str, float], folder: str | None
    ) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second

        from layerzoo.support.curve_plots import draw, families

        for family in families(figures):
            canvas = FigureCanvasAgg(draw(family))
            canvas.draw()
            image = np.asarray(canvas.buffer_rgba())[..., :3]
            name = "-".join([family.name.replace("/", "-"), *family.sides])
            trainer.logger.experiment.add_image(
                f"{prefix}figures/{name}", image, trainer.global_step, dataformats="HWC"
            )
            if folder is not None:
                path = Path(folder, f"{name}.png")
                canvas.figure.savefig(path, dpi=130)
                print(f"figure: {path}")


def _figures(trainer: Any, prefix: str) -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {n.removeprefix(prefix): value for n, value in found.items() if n.startswith(prefix)}


Rows = dict[str, list[float | None]]


def table(figures: Mapping[str, float], parts: Sequence[str]) -> Rows:
    """Rows of figures: one column, or of several parts the mean and each of them."""
    columns = ["", *parts] if len(parts) > 1 else [""]
    rows: Rows = {}
    for name, value in figures.items():
        base, _, part = name.rpartition("/")
        if part not in columns[1:]:
            base, part = name, ""
        rows.setdefault(base, [None] * len(columns))[columns.index(part)] = value
    return rows


def _cells(values: Sequence[float | None]) -> list[str]:
    return ["" if v is None else _written(v) for v in values]


def _written(value: float) -> str:
    """4,096, 0.1235, nan, inf"""
    whole = float(value).is_integer() and abs(value) < 1e15
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def show(rows: Rows, heads: Sequence[str]) -> None:
    """Print a table."""
    out = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(heads):
        out.add_column(head, justify="right" if n else "left", no_wrap=True)
    for name, values in rows.items():
        out.add_row(name, *_cells(values))
    Console(width=None if Console().is_terminal else 200).print(out)


def markdown(rows: Rows, heads: Sequence[str]) -> str:
    """The table as TensorBoard's text plugin reads it."""
    lines = [heads, ["---"] * len(heads), *([name, *_cells(v)] for name, v in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
