"""`layerzoo fit|validate|test|predict`: the LightningCLI, its callbacks, one-line errors."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning
import torch
from lightning import Callback
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerzoo.data import Task
from layerzoo.lit import SHOWN, LitModel, read_checkpoint
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.spec import SpecError, at, suggest

SUBCOMMANDS = ("fit", "validate", "test", "predict")

jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def quiet() -> None:
    """Silence adverts, and advice that does not apply: batches are made by vectorised hashing,
    faster than a worker process could hand them over."""
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A resumed run logs into a folder of its own.
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    # Lightning 2.6 calls jsonargparse by names that it has since renamed.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Lightning 2.6 asks torch for a pytree name that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def named_configs() -> dict[str, Path]:
    """The configs that ship with the package, by name."""
    folder = Path(str(resources.files("layerzoo"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_path(name: str) -> str:
    """The path of a config file, or of a shipped config by its name."""
    configs = named_configs()
    if Path(name).is_file():
        return name
    if name not in configs:
        raise SpecError(
            f"--config {name}: no such file or shipped config; {suggest(name, configs)}"
        )
    return str(configs[name])


def spec_error(error: BaseException | None) -> SpecError | None:
    """The SpecError that an exception was raised from, if any."""
    while error is not None and not isinstance(error, SpecError):
        error = error.__cause__ or error.__context__
    return error


class Parser(LightningArgumentParser):
    """Reports an error as a SpecError of one line, with a suggestion for a mistyped option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.search(r'Parser key "([^"]+)"', message)
        place = f"{key[1]}: " if key else ""
        unknown = re.search(
            r"unrecognized arguments: --(\S+)|not accept option '(\S+)'|Option '(\S+)' is not",
            message,
        )
        task = re.search(r"Expected a dot import path string: (\S+)", message)
        if cause := spec_error(ex):
            raise SpecError(f"{place}{cause}") from None
        if unknown:
            word = next(filter(None, unknown.groups())).split("=")[0]
            known = _options(self)
            raise SpecError(f"{place}{word}: no such option; {suggest(word, known)}") from None
        if task:
            known = [cls.__name__ for cls in Task.__subclasses__()]
            raise SpecError(f"{place}no task '{task[1]}'; {suggest(task[1], known)}") from None
        text = re.sub(r'^Parser key "[^"]+":', "", message.strip()).strip().splitlines()[0]
        raise SpecError(f"{place}{text}") from None


def _options(parser: jsonargparse.ArgumentParser) -> set[str]:
    """The names of a parser's options, and of its subcommands'."""
    names = {action.dest for action in parser._actions}
    subcommands = parser._subcommands_action
    for sub in subcommands._name_parser_map.values() if subcommands else ():
        names |= _options(sub)
    return names


class TokensPerSecond(Callback):
    """Logs `speed/tokens_per_s`, training throughput without validation, to bar and logger."""

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
        pl_module.log("speed/tokens_per_s", rate, prog_bar=True)


class ConfigWriter(SaveConfigCallback):
    """Writes `config.yaml` beside the logs, if there are any."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class Summary(Callback):
    """When training ends: prints the first and the last held-out figures, and writes
    `record.json` beside the logs: what ran, and on what."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.history: dict[str, list[tuple[int, float]]] = {}
        pl_module.model.forget_choices()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for name in SHOWN:
            if name in trainer.callback_metrics:
                value = (trainer.global_step, float(trainer.callback_metrics[name]))
                self.history.setdefault(name, []).append(value)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        for name, values in self.history.items():
            (first, before), (last, after) = values[0], values[-1]
            print(f"{name}: {before:.3f} at step {first}, {after:.3f} at step {last}")
        if trainer.logger is not None:
            print(f"logs: {trainer.log_dir}")
            length = getattr(trainer.datamodule, "length", 1)
            text = json.dumps(record(pl_module.model, length), indent=2)
            Path(trainer.log_dir, "record.json").write_text(text + "\n")


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


def record(model: LanguageModel, length: int) -> dict[str, Any]:
    """Sizes of a model at a sequence length, which implementations ran, and the versions."""
    size = model.state_bytes(length)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": size.total,
        "state_bytes_memory": size.memory,
        "flops_per_token": model.flops_per_token(length),
        "length": length,
        "impl": model.choices(),
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


class TrainCLI(LightningCLI):
    """LightningCLI over `LitModel` and any `Task`, with omegaconf interpolation in configs."""

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        quiet()
        logger = {
            "class_path": f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__qualname__}",
            "init_args": {"save_dir": "runs", "name": "layerzoo", "default_hp_metric": False},
        }
        callbacks = [TokensPerSecond(), Summary(), PredictionWriter()]
        super().__init__(
            LitModel,
            Task,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=ConfigWriter,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_defaults={"logger": logger, "callbacks": callbacks},
            seed_everything_default=0,
            args=list(args),
            run=run,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's network replaces the config's; everything else is the config's."""
        options = self.config[self.config.subcommand] if "subcommand" in self.config else {}
        path = options.get("ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry"):
            network = read_checkpoint(path)["hyper_parameters"]["network"]
            options["model"]["network"] = jsonargparse.Namespace(**network)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise (spec_error(error) or error) from None

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand] if self.subcommand else self.config
        with at("model.network"):
            ModelConfig.from_fields(options["model"]["network"].as_dict())


def main(argv: Sequence[str]) -> int:
    """Run one of SUBCOMMANDS, with shipped configs by name."""
    args = [part for arg in argv for part in _split_config(arg)]
    places = [n + 1 for n, arg in enumerate(args[:-1]) if arg in ("-c", "--config")]
    for n in places:
        args[n] = config_path(args[n])
    try:
        TrainCLI(args)
    except OmegaConfBaseException as error:
        raise SpecError(_interpolation(error, [args[n] for n in places])) from None
    return 0


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _interpolation(error: OmegaConfBaseException, configs: Sequence[str]) -> str:
    """One line for an interpolation that cannot be resolved."""
    place = re.sub(rf"^({'|'.join(SUBCOMMANDS)})\.", "", str(error.full_key or "config"))
    missing = re.search(r"Interpolation key '\.*([^']+)' not found", str(error))
    if missing is None:
        return f"{place}: {str(error).splitlines()[0]}"
    known: set[str] = set()
    for path in configs:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        known |= set(_keys(tree))
    return f"{place}: ${{{missing[1]}}} refers to nothing; {suggest(missing[1], known)}"


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield f"{prefix}{name}"
            yield from _keys(value, f"{prefix}{name}.")
