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


class Figures(Callback):
    """Draws the curves and heat maps of the held-out figures when training and testing end, into
    TensorBoard's images; prints the test split's table, logs it as text, and saves its figures as
    `<family>.png` beside the logs."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            figures = {n: float(v) for n, v in trainer.callback_metrics.items()}
            self._draw(trainer, "", figures)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        folder = trainer.log_dir  # asks every rank
        if not trainer.is_global_zero:
            return
        found = {n: float(v) for n, v in trainer.callback_metrics.items()}
        figures = {n.removeprefix("test/"): v for n, v in found.items() if n.startswith("test/")}
        task = trainer.datamodule
        parts = [*task.parts("test")] if isinstance(task, Task) else [""]
        rows = table(figures, parts)
        show(rows, parts)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("test/figures", markdown(rows, parts))
        self._draw(trainer, "test/", figures, folder)

    def _draw(
        self, trainer: Any, prefix: str, figures: Mapping[str, float], folder: str | None = None
    ) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second

        from layerzoo.figures import draw, families

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
    return ["" if v is None else f"{v:,.0f}" if v == round(v) else f"{v:.4g}" for v in values]


def show(rows: Rows, parts: Sequence[str]) -> None:
    """Print a table."""
    out = Table(box=SIMPLE_HEAD, padding=(0, 1))
    out.add_column("test", no_wrap=True)
    for head in ("mean", *parts) if len(parts) > 1 else ("",):
        out.add_column(head, justify="right", no_wrap=True)
    for name, values in rows.items():
        out.add_row(name, *_cells(values))
    Console(width=None if Console().is_terminal else 200).print(out)


def markdown(rows: Rows, parts: Sequence[str]) -> str:
    """The table as TensorBoard's text plugin reads it."""
    heads = ["test", *(("mean", *parts) if len(parts) > 1 else ("",))]
    lines = [heads, ["---"] * len(heads), *([name, *_cells(v)] for name, v in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
