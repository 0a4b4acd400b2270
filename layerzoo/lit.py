"""The LightningModule: loss, optimiser, metrics, nothing else."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from layerzoo.data.task import IGNORE, Task
from layerzoo.metrics import TokenLoss
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.spec import SpecError, at

SHOWN = ("loss/held_out", "loss/bits_per_byte", "recall/accuracy", "accuracy/all")
"""The held-out figures that the progress bar and the summary show."""


class LitModel(LightningModule):
    """Trains a `LanguageModel` on a task with AdamW.

    Args:
        network: the language model's config.
        lr, weight_decay, betas: of AdamW; only weights of linear maps decay.
        warmup: share of the steps over which the learning rate rises linearly.
        schedule: cosine falls to zero at the last step; constant stays.
        impl: how the layers run; it does not change the function.
        checkpoint: layers keep less for the backward pass and compute it again; nor does this.
        compiled: layers compile their inner loops (needs a C++ compiler); nor does this.
    """

    def __init__(
        self,
        network: ModelConfig,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.05,
        schedule: Literal["cosine", "constant"] = "cosine",
        impl: Literal["auto", "recurrent", "chunked", "triton"] = "auto",
        checkpoint: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(network, Mapping):  # from a checkpoint
            network = ModelConfig.from_fields(network)
        self.save_hyperparameters(
            {
                "network": network.to_fields(),
                "lr": lr,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "warmup": warmup,
                "schedule": schedule,
                "impl": impl,
                "checkpoint": checkpoint,
                "compiled": compiled,
            }
        )
        for name, value, low, high in (
            ("lr", lr, 0, math.inf),
            ("weight_decay", weight_decay, 0, math.inf),
            ("warmup", warmup, 0, 1),
            ("betas", min(betas), 0, 1),
            ("betas", max(betas), 0, 1 - 1e-9),
        ):
            if not low <= value <= high:
                raise SpecError(f"model.{name}: must be in [{low}, {high}], got {value}")
        with at("model.network"):
            self.model = LanguageModel(
                network, impl=impl, checkpoint=checkpoint, compiled=compiled
            )
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup, self.schedule = warmup, schedule
        self.metrics = nn.ModuleDict()
        self.readout: nn.Module | None = None  # of a task that has one

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
        return self.model(tokens)[0]

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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels, _ = self.labelled(batch)
        # The mean; of a batch without any label it is 0, not nan.
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))
        self.log("loss/train", loss, prog_bar=True, batch_size=len(labels))
        return loss

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
        results: dict[str, dict[str, Tensor]] = {}
        for n, part in enumerate(task.parts(split) if isinstance(task, Task) else [""]):
            results[part] = {}
            for metric in self._each_metric(split, n):
                results[part] |= metric.compute()
                metric.reset()
        figures = task.summary(split, results) if isinstance(task, Task) else results[""]
        for name, value in figures.items():
            self.log(prefix + name, value, prog_bar=name in SHOWN, sync_dist=True)

    def configure_optimizers(self) -> Any:
        embedding = self.model.embedding.weight
        linear = {m.weight for m in self.modules() if isinstance(m, nn.Linear)} - {
            embedding
        }  # the head's weight may be the embedding's
        groups = [
            {"params": [p for p in self.parameters() if p in linear]},
            {"params": [p for p in self.parameters() if p not in linear], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if math.isinf(total):
                return 1.0
            warm = max(1, round(self.warmup * total))
            if step < warm:
                return (step + 1) / warm
            if self.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that `layerzoo fit` wrote.

    Raises:
        SpecError: the file is missing, cut off, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for part in (checkpoint["state_dict"], checkpoint["hyper_parameters"]["network"]):
            len(part)  # both are mappings, or this is another program's file
    except OSError as error:
        raise SpecError(f"checkpoint {path}: cannot be read: {error.strerror}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise SpecError(
            f"checkpoint {path}: is damaged, or not one that layerzoo wrote "
            f"({type(error).__name__}); use another, such as an earlier step's"
        ) from None
    return checkpoint


def load_model(path: str | Path, impl: str = "auto") -> LanguageModel:
    """The language model of a checkpoint, on the CPU, in evaluation mode."""
    checkpoint = read_checkpoint(path)
    with at(f"checkpoint {path}"):
        config = ModelConfig.from_fields(checkpoint["hyper_parameters"]["network"])
        model = LanguageModel(config, impl=impl)
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise SpecError(
            f"checkpoint {path}: its weights are not of its config: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None
    return model.eval()
