"""A worker process: runs the cells whose folders it reads from standard input, one a line.

It answers on standard output in JSON lines, `{"step", "steps", "loss"}` and at last `{"done"}`.
A cell that raises ends the process: its traceback is in the cell's log.txt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning import Callback

from layerzoo.callbacks import record
from layerzoo.training import TrainCLI

CONFIG, METRICS, LOG = "cell.yaml", "metrics.json", "log.txt"


class Progress(Callback):
    """Reports the step to the runner, at most twice a second."""

    def __init__(self, answers: TextIO) -> None:
        self.answers, self.last = answers, 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            state = {
                "step": trainer.global_step,
                "steps": trainer.estimated_stepping_batches,
                "loss": float(outputs["loss"]),
            }
            print(json.dumps(state), file=self.answers, flush=True)


def run_cell(folder: Path, answers: TextIO) -> None:
    """Train, test, and write metrics.json as the last thing, whole or not at all."""
    started = time.perf_counter()
    cli = TrainCLI(["--config", str(folder / CONFIG)], run=False)
    trainer: Any = cli.trainer
    trainer.callbacks.append(Progress(answers))
    trainer.fit(cli.model, cli.datamodule)
    tested, *_ = trainer.test(cli.model, cli.datamodule, verbose=False)  # each part has all
    metrics = {
        **{name.removeprefix("test/"): value for name, value in tested.items()},
        "seconds": time.perf_counter() - started,
        "steps": trainer.global_step,
        "chance": getattr(cli.datamodule, "chance", None),
        **record(cli.model.model, trainer),
    }
    part = folder / (METRICS + ".part")
    part.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(part, folder / METRICS)


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            folder = Path(line.strip())
            # Everything that the run prints, from any library, belongs in its log.
            with open(folder / LOG, "ab", buffering=0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            run_cell(folder, answers)
            print(json.dumps({"done": True}), file=answers, flush=True)


if __name__ == "__main__":
    main()
