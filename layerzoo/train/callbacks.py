"""What every training run does beside training: throughput, summary, config, predictions."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from layerzoo.layer import Layer
from layerzoo.model import LanguageModel
from layerzoo.spec import Config, SpecError
from layerzoo.support.arguments import make_folder
from layerzoo.support.configured import Configured
from layerzoo.support.json_files import write_json
from layerzoo.support.provenance import versions
from layerzoo.train.module import SHOWN
from layerzoo.train.trained_on import digests


class TokensPerSecond(Callback):
    """Logs `tokens/s`, training throughput without validation, to bar and logger."""

    def _restart(self) -> None:
        self.since, self.tokens = time.perf_counter(), 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._restart()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += batch["tokens"].numel() * trainer.world_size
        rate = self.tokens / (time.perf_counter() - self.since)
        pl_module.log("tokens/s", round(rate), prog_bar=True)


class ConfigWriter(SaveConfigCallback):
    """Writes `config.yaml` beside the logs, if there are any; refuses, before anything is trained,
    a folder that holds a run already, or that cannot be written."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.logger is None:
            return
        folder = trainer.log_dir  # asks every rank
        if trainer.is_global_zero and folder is not None:
            if Path(folder, self.config_filename).is_file():
                raise SpecError(
                    f"{folder}: holds a run already; give --trainer.logger.init_args.version "
                    f"another name, or leave it out"
                )
            make_folder("--trainer.logger.init_args.save_dir", Path(folder))
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        for callback in trainer.callbacks:
            place = getattr(callback, "folder", None) or getattr(callback, "dirpath", None)
            if isinstance(callback, Checkpoint) and place and "://" not in str(place):
                make_folder("checkpoints", Path(place))


class Summary(Callback):
    """When training ends: prints the first and the last held-out figures, and writes
    `record.json` beside the logs: what ran, and on what."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.history: dict[str, list[tuple[int, float]]] = {}  # a resumed run loads its own after
        if stage == "fit":
            pl_module.model.forget_choices()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for name in SHOWN:
            if name in trainer.callback_metrics:
                value = (trainer.global_step, float(trainer.callback_metrics[name]))
                self.history.setdefault(name, []).append(value)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        folder = trainer.log_dir if trainer.logger is not None else None  # asks every rank
        if not trainer.is_global_zero:
            return
        for name, values in self.history.items():
            (first, before), (last, after) = values[0], values[-1]
            print(f"{name}: {before:.3f} at step {first}, {after:.3f} at step {last}")
        if folder is not None:
            print(f"logs: {folder}")
            path = Path(folder, "record.json")
            try:
                write_json(path, record(pl_module.model, trainer))
            except OSError as error:  # a full disk: what was trained is kept all the same
                rank_zero_warn(f"{path}: {error.strerror}: not saved")


class Diagnostics(Callback):
    """Logs what the layers say of their work on the first held-out batch, as
    `memory/<block>.<layer>/<figure>`; see each layer's `diagnose`. Add it to `trainer.callbacks`.
    """

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.inputs: dict[str, tuple[Layer, Tensor]] = {}
        self.hooks = [
            layer.register_forward_pre_hook(functools.partial(self._keep, name))
            for name, layer in named_layers(pl_module.model)
        ]

    def _keep(self, name: str, layer: Layer, args: tuple[Tensor, ...]) -> None:
        self.inputs.setdefault(name, (layer, args[0]))

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        for name, (layer, x) in self.inputs.items():
            for figure, value in layer.diagnose(x).items():
                tag = f"memory/{name}/{figure}"
                pl_module.log(tag, value, on_step=False, on_epoch=True, batch_size=1)
        self.hooks, self.inputs = [], {}


class Controls(Configured, Callback):
    """What remains of a trained model without its memory, or with a short one: switches, while it
    is validated and tested, layers that have them (`parallel` and `reset`)."""

    class Config(Config):
        off: Sequence[int] = ()
        """Every `parallel` leaves out these children: [1] is a window without its memory, [0] a
        memory without its window."""
        every: int | None = None
        """Every `reset` starts anew after this many tokens; null leaves it as it is."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.changes: dict[str, Any] = {"off": tuple(config.off)} if config.off else {}
        if config.every is not None:
            self.changes["every"] = config.every

    def _switch(self, model: nn.Module) -> None:
        self.before: list[tuple[Layer, str, Any]] = []
        for _, layer in named_layers(model):
            for name, value in self.changes.items():
                if hasattr(layer, name):
                    self.before.append((layer, name, getattr(layer, name)))
                    setattr(layer, name, value)
        missing = self.changes.keys() - {name for _, name, _ in self.before}
        if missing:
            raise SpecError(f"Controls: {min(missing)}: no layer of this model has such a switch")

    def _restore(self) -> None:
        for layer, name, value in self.before:
            setattr(layer, name, value)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._switch(pl_module.model)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._restore()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._switch(pl_module.model)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._restore()


def named_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Every layer with its block and name; of a composition, the children too."""
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            yield ".".join([*filter(str.isdigit, path.split(".")), module.name]), module


class PredictionWriter(BasePredictionWriter):
    """`layerzoo predict` saves each batch's predictions, labels and annotations in one file."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        folder = Path(trainer.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"predictions-{trainer.global_rank}.pt"
        torch.save(predictions, path)
        print(f"predictions: {path}")


def record(model: Any, trainer: Any) -> dict[str, Any]:
    """Sizes of a `TaskModule`'s model at its task's length, of a language model all fields of its
    layers, which implementations ran, where, versions, and digests of what was read."""
    length = getattr(trainer.datamodule, "length", 1)
    device = trainer.strategy.root_device
    size = model.state_bytes(length)
    network = {"network": model.config.to_fields()} if isinstance(model, LanguageModel) else {}
    return {
        **network,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": size.total,
        "state_bytes_memory": size.memory,
        "flops_per_token": model.flops_per_token(length),
        "length": length,
        "impl": model.choices(),
        "digest": digests(trainer.lightning_module, trainer.datamodule),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
