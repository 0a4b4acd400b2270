"""`layerzoo fit|validate|test|predict`: the LightningCLI, and errors in one line."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerzoo.data import Task
from layerzoo.data.replaced_task import replaced
from layerzoo.layer import EXECUTION
from layerzoo.model import ModelConfig
from layerzoo.spec import SpecError, error_at, plain, suggest
from layerzoo.support import error_lines, internals
from layerzoo.support.arguments import make_folder
from layerzoo.support.yaml_files import config_path, read_yaml
from layerzoo.train.callbacks import ConfigWriter, PredictionWriter, Summary, TokensPerSecond
from layerzoo.train.checkpoints import AtomicIO, Resume
from layerzoo.train.find_checkpoint import find_checkpoint
from layerzoo.train.finite import Finite
from layerzoo.train.held_out import HeldOutFigures
from layerzoo.train.lit import LitModel, read_checkpoint
from layerzoo.train.named_module import MODULE, module_class, named_module, split_option
from layerzoo.train.parser import TrainingParser, check_trainer
from layerzoo.train.resumed import Resumed, same_start
from layerzoo.train.trained_on import TRAINED_ON, TrainedOn

SUBCOMMANDS = ("fit", "validate", "test", "predict")
MAX_SEED = 2**32 - 1
"""NumPy's."""

jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def quiet() -> None:
    """Silence adverts, and advice that does not apply: batches are made by vectorised hashing,
    faster than a worker process could hand them over."""
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(_no_tip)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Predictions are saved with their labels; nothing needs their indices.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices.*")
    # Nor does this: our loaders deal every held-out sample once, whatever the processes.
    warnings.filterwarnings("ignore", message=".*Using `DistributedSampler` with the.*")
    # A resumed run logs into a folder of its own.
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    # Lightning 2.6 calls jsonargparse by names that it has since renamed.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Lightning 2.6 asks for a leaf of a pytree in a way that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


@internals.reads_checkpoints
class TrainCLI(LightningCLI):
    """LightningCLI over the `TaskModule` that the arguments name, else `LitModel`, and any `Task`,
    with omegaconf interpolation in configs."""

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        quiet()
        self.names = args[:1] if run else SUBCOMMANDS
        logger = {
            "class_path": f"{TensorBoardLogger.__module__}.{TensorBoardLogger.__qualname__}",
            "init_args": {"save_dir": "runs", "name": "layerzoo", "default_hp_metric": False},
        }
        callbacks = [
            Resume(),
            TokensPerSecond(),
            Summary(),
            HeldOutFigures(),
            PredictionWriter(),
            Finite(),
            TrainedOn(),
        ]
        super().__init__(
            named_module(args),
            Task,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=ConfigWriter,
            parser_class=TrainingParser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_defaults={"logger": logger, "callbacks": callbacks},
            seed_everything_default=0,
            args=list(args),
            run=run,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        about = "Train the TaskModule at this import path. model holds its options."
        parser.add_argument("--module", type=str, default=MODULE, help=about)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is run: the parser of each takes a seventh of a second. It is without
        Lightning's own table of the figures, for `HeldOutFigures` prints one."""
        known = LightningCLI.subcommands()
        return {name: known[name] | {"verbose"} for name in self.names}

    def validate(self, **options: Any) -> None:
        self.trainer.validate(**options, verbose=False)

    def test(self, **options: Any) -> None:
        self.trainer.test(**options, verbose=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        name = self.config.get("subcommand")
        options = self.config[name] if name else self.config
        module = options["module"]
        if module_class(module) is not self.model_class:  # argparse takes --modul for it
            raise SpecError(f"module: {module} was given in short; write it in full, --module")
        seed = options["seed_everything"]
        if seed is not True and not 0 <= seed <= MAX_SEED:
            raise SpecError(f"seed_everything: must be in [0, {MAX_SEED}], got {seed}")
        check_trainer(options["trainer"])

    def read_checkpoint(self) -> None:
        """A checkpoint's network, of a module that has one, replaces the config's; everything else
        is the config's. Training goes on only with the hyperparameters that it began with."""
        options = self.config[self.config.subcommand] if "subcommand" in self.config else {}
        path = options.get("ckpt_path")
        if path is None and self.config.get("subcommand") in SUBCOMMANDS[1:]:
            raise SpecError(f"{self.config.subcommand}: needs --ckpt_path, a checkpoint of `fit`")
        if path is None:
            return
        options["ckpt_path"] = path = find_checkpoint(str(path), log_folder(options["trainer"]))
        checkpoint, asked = read_checkpoint(path), options["model"].as_dict()
        trained = checkpoint["hyper_parameters"]
        strange = sorted(trained.keys() - asked.keys())
        if strange or ("network" in asked and "network" not in trained):
            what = f"its {strange[0]} is no option" if strange else "is no checkpoint"
            raise SpecError(
                f"checkpoint {path}: {what} of {options['module']}; give the module that saved it"
            )
        network = asked.get("network")
        if self.config.subcommand == "fit":
            if network is not None:
                asked["network"] = ModelConfig.from_fields(network).to_fields()
            self.resumed = Resumed(path, checkpoint.get(TRAINED_ON), "init" in asked)
            _same_hyperparameters(asked, trained, self.resumed)
        if "init" in asked:
            options["model"]["init"] = trained.get("init")
        if network is not None:
            options["model"]["network"] = jsonargparse.Namespace(**trained["network"])

    resumed: Resumed | None = None
    """What `fit` goes on from."""

    def after_instantiate_classes(self) -> None:
        seed = internals.cli_option(self, "seed_everything")
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, TrainedOn):
                callback.seed = seed
        if self.resumed is not None:
            self.resumed.check(trainer, self.model, self.datamodule, seed)
        elif self.subcommand == "fit" and isinstance(self.model, LitModel):
            self.model.begin()  # here, so that a run that cannot begin leaves nothing behind

    def instantiate_trainer(self, **options: Any) -> Any:
        try:
            trainer: Any = super().instantiate_trainer(**options)
        except Exception as error:
            if message := error_lines.line(error):
                raise SpecError(f"trainer: {message}") from error
            raise
        for folder in {logger.save_dir for logger in trainer.loggers if logger.save_dir}:
            if "://" not in folder:
                make_folder("trainer.logger.save_dir", Path(folder))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not a plugin of the user's
            trainer.strategy.checkpoint_io = AtomicIO()
        # First, because others may draw random numbers.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, Resume))
        return trainer

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise (error_lines.spec_error(error) or error) from None

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand] if self.subcommand else self.config
        if "network" in options["model"]:
            with error_at("model.network"):
                network = ModelConfig.from_fields(options["model"]["network"].as_dict())
                options["model"]["network"] = jsonargparse.Namespace(**network.to_fields())


def log_folder(trainer: Any) -> Path:
    """Where the runs of a config are, by its trainer's options."""
    options = getattr(trainer.get("logger"), "init_args", None) or {}
    return Path(options.get("save_dir") or "runs", options.get("name") or "")


def _same_hyperparameters(
    asked: dict[str, Any], trained: dict[str, Any], resumed: Resumed
) -> None:
    """Raise for the first hyperparameter that is not the checkpoint's, but for how layers run; of
    a path what it leads to is compared later, if the checkpoint says what that was."""
    read = {name.removeprefix("model.") for name in resumed.digest if name.startswith("model.")}
    free = {"network", "init", *EXECUTION, *read}
    network = trained.get("network", {})
    pairs = {f"network.{n}": (asked["network"].get(n), v) for n, v in network.items()}
    pairs |= {n: (asked[n], v) for n, v in trained.items() if n not in free}
    for name, (now, before) in pairs.items():
        if plain(now) != before:
            raise SpecError(
                f"model.{name}: {now}, but the checkpoint to resume was trained with {before}; "
                f"{resumed.way_out}"
            )
    same_start(asked.get("init"), trained.get("init"), resumed)


def main(argv: Sequence[str]) -> int:
    """Run one of SUBCOMMANDS, with shipped configs by name."""
    args = [part for arg in argv for part in split_option(arg)]
    places = [n + 1 for n, arg in enumerate(args[:-1]) if arg in ("-c", "--config")]
    trees = []
    for n in places:
        args[n] = config_path(args[n])
        trees.append(OmegaConf.to_container(read_yaml(args[n]), resolve=False))
    _say_what_is_replaced(trees, args)
    try:
        TrainCLI(args)
    except OmegaConfBaseException as error:
        raise SpecError(_interpolation(error, [args[n] for n in places])) from None
    return 0


@rank_zero_only
def _say_what_is_replaced(trees: Sequence[Any], args: Sequence[str]) -> None:
    """Say which options of a config's task are dropped, and which are kept, where a later config
    or the command line names another task."""
    options = [*pairwise(args), *(arg.split("=", 1) for arg in args if "=" in arg)]
    configs, named = iter(trees), []
    for name, value in options:
        if name in ("-c", "--config"):
            data = next(configs).get("data")
            named += [data] if isinstance(data, Mapping) else []
        elif name in ("--data", "--data.class_path"):
            named.append({"class_path": value})
    for written, later in pairwise(named):
        if found := replaced(written, later.get("class_path")):
            given = {name.rpartition(".")[2] for name, _ in options if name.startswith("--data.")}
            kept = {name: value for name, value in found.kept.items() if name not in given}
            print(f"layerzoo: data: {found._replace(kept=kept)}", file=sys.stderr)


def _interpolation(error: OmegaConfBaseException, configs: Sequence[str]) -> str:
    """One line for an interpolation that cannot be resolved."""
    place = re.sub(rf"^({'|'.join(SUBCOMMANDS)})\.", "", str(error.full_key or "config"))
    missing = re.search(r"Interpolation key '\.*([^']+)' not found", str(error))
    if missing is None:
        return f"{place}: {str(error).splitlines()[0]}"
    known: set[str] = set()
    for path in configs:
        known |= set(_keys(OmegaConf.to_container(read_yaml(path), resolve=False)))
    if missing[1] in known:  # it was there, until the command line chose another class
        return f"{place}: ${{{missing[1]}}} is not an option of the chosen class; set {place}"
    return f"{place}: ${{{missing[1]}}} refers to nothing; {suggest(missing[1], known)}"


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield f"{prefix}{name}"
            yield from _keys(value, f"{prefix}{name}.")
