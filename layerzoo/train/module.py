"""The LightningModule of any model on a task: optimiser, metrics, nothing of the model."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from layerzoo.data.task import IGNORE, Task
from layerzoo.metrics import TokenLoss
from layerzoo.metrics.wide import WideDict, wide
from layerzoo.spec import Config, SpecError, require
from layerzoo.support.configured import Configured

SHOWN = ("loss/held_out", "loss/bits_per_byte", "recall/accuracy", "accuracy/all")
"""The held-out figures that the progress bar and the summary show."""
_nobody: Any = (None for _ in ())
ORPHAN = _nobody.gi_frame
"""A frame that nothing has called."""


class TaskModule(Configured, LightningModule):
    """Evaluates a model on a task, and trains its parameters that need a gradient, with AdamW.

    A subclass builds `self.model` and defines `training_step`. The fields of its config are the
    hyperparameters of its checkpoints; a resumed run is refused if they differ.

    The model has `hidden(tokens, documents=) -> h, state`, `head(h) -> logits`, `embedding` and
    `cautions(T)`. For the record of a run it also has `state_bytes(T)`, `flops_per_token(T)`,
    `choices()` and `forget_choices()`: see `LanguageModel`. The task may ask for more.
    """

    class Config(Config):
        lr: float = 3e-3
        """AdamW's learning rate rises to this value in the warmup."""
        weight_decay: float = 0.1
        """AdamW decays the weights of linear maps, and no others, by lr times this factor."""
        betas: tuple[float, float] = (0.9, 0.95)
        """AdamW averages gradients and their squares with these decays."""
        warmup: float = 0.05
        """The learning rate rises linearly over this share of the steps."""
        schedule: Literal["cosine", "constant"] = "cosine"
        """After the warmup the learning rate falls along a cosine, which would reach zero one step
        after the last, or it stays constant."""

        def check(self) -> None:
            super().check()
            within("lr", self.lr, 0)
            within("weight_decay", self.weight_decay, 0)
            within("warmup", self.warmup, 0, 1)
            within("betas", min(self.betas), 0, 1)
            within("betas", max(self.betas), 0, 1 - 1e-9)

    config: Any
    model: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.save_hyperparameters(config.to_fields())
        self.metrics = WideDict()
        self.readout: nn.Module | None = None  # of a task that has one

    @classmethod
    def located(cls, error: SpecError) -> str:
        dot = "." if re.match(r"\w+[:.]", str(error)) else ": "
        return f"model{dot}{error}"

    def save_hyperparameters(self, *args: Any, **options: Any) -> None:
        """As Lightning's, of a mapping. Lightning would look for the arguments of constructors in
        the frames that call it; this one frame has no callers."""
        super().save_hyperparameters(*args, **{"frame": ORPHAN, **options})

    def setup(self, stage: str) -> None:
        task = getattr(self.trainer, "datamodule", None)
        if isinstance(task, Task):
            task.attach(self.model)
            if self.readout is None:
                self.readout = task.readout(self.model)
        if stage == "fit" and (length := getattr(task, "length", None)):
            for line in self.model.cautions(length):
                rank_zero_warn(line, stacklevel=1)
        for split in ("val", "test"):  # anew: it may be another task than the last
            self.metrics[split] = self._metrics(task, split)

    def _metrics(self, task: Any, split: str) -> nn.ModuleList:
        """A split's metrics, a list for each part."""
        if not isinstance(task, Task):
            return nn.ModuleList([nn.ModuleList([TokenLoss()])])
        for part in task.parts(split).values():
            part.attach(self.model)
        return nn.ModuleList(
            [nn.ModuleList(part.metrics()) for part in task.parts(split).values()]
        )

    def _each_metric(self, split: str, part: int) -> list[Metric]:
        parts: Any = self.metrics[split]
        return [metric for metric in parts[part] if isinstance(metric, Metric)]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.head(self.model.hidden(tokens)[0])

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits `[N, vocab]`, labels `[N]` and annotations at the N labelled positions."""
        batch = dict(batch)
        h, _ = self.model.hidden(batch.pop("tokens"), documents=batch.pop("documents", None))
        labels = batch.pop("labels")
        where = labels != IGNORE
        annotations = {
            name: value.expand(*where.shape, *value.shape[2:])[where]
            for name, value in batch.items()
        }
        logits = self.model.head(h[where]) if self.readout is None else self.readout(h, where)
        return logits, labels[where], annotations

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measure("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val", prefix="")

    def on_test_epoch_end(self) -> None:
        self._report("test", prefix="test/")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits, labels, annotations = self.labelled(batch)
        return {"prediction": logits.argmax(-1), "label": labels, **annotations}

    def _measure(self, split: str, batch: dict[str, Tensor], part: int) -> None:
        logits, labels, annotations = self.labelled(batch)
        for metric in self._each_metric(split, part):
            metric.update(logits, labels, **annotations)

    def _report(self, split: str, prefix: str) -> None:
        """Log what the task makes of each part's figures."""
        task = getattr(self.trainer, "datamodule", None)
        results: dict[str, dict[str, Any]] = {}
        for n, part in enumerate(task.parts(split) if isinstance(task, Task) else [""]):
            results[part] = {}
            for metric in self._each_metric(split, n):
                results[part] |= metric.compute()
                metric.reset()
        figures = task.summary(split, results) if isinstance(task, Task) else results[""]
        for name, value in figures.items():
            value = wide(value, self.device)
            self.log(prefix + name, value, prog_bar=name in SHOWN, sync_dist=True)

    def digest(self) -> dict[str, str]:
        """What the module reads, see `Task.digest`."""
        return {}

    def rate(self, name: str) -> float:
        """The learning rate of a parameter, by its name, as a multiple of `lr`."""
        return 1.0

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups of the parameters that need a gradient: by their rate, each those that
        decay and those that do not; first those of rate 1."""
        embedding = self.model.embedding.weight
        linear = {m.weight for m in self.modules() if isinstance(m, nn.Linear)} - {
            embedding
        }  # the head's weight may be the embedding's
        found: dict[float, tuple[list[Tensor], list[Tensor]]] = {1.0: ([], [])}
        for name, p in self.named_parameters():
            if p.requires_grad:
                found.setdefault(self.rate(name), ([], []))[p not in linear].append(p)
        groups: list[dict[str, Any]] = []
        for rate, (decayed, rest) in sorted(found.items(), key=lambda item: item[0] != 1):
            lr = rate * self.config.lr
            groups.append({"params": decayed, "lr": lr})
            groups.append({"params": rest, "lr": lr, "weight_decay": 0.0})
        return groups

    def configure_optimizers(self) -> Any:
        config = self.config
        optimiser = torch.optim.AdamW(
            self.groups(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if math.isinf(total):
                return 1.0
            warm = max(1, round(config.warmup * total))
            if step < warm:
                return (step + 1) / warm
            if config.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }


def within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse an option that is out of its range, or not finite."""
    end = f"{high}]" if math.isfinite(high) else "inf)"
    possible = low <= value <= high and math.isfinite(value)
    require(possible, f"{name}: must be in [{low}, {end}, got {value}")
