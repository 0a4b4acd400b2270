"""`layerzoo fit|validate|test|predict`: the LightningCLI, and errors in one line."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_args

import jsonargparse
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerzoo import foreign, internals
from layerzoo.arguments import OneLine, make_folder
from layerzoo.callbacks import ConfigWriter, PredictionWriter, Summary, TokensPerSecond
from layerzoo.checkpoints import AtomicIO, Resume, find_checkpoint
from layerzoo.config_files import (
    MODULE,
    config_path,
    module_class,
    named_module,
    read_yaml,
    split_option,
)
from layerzoo.configured import Configured
from layerzoo.data import Task, list_tasks
from layerzoo.field_docs import field_docs
from layerzoo.finite import Finite
from layerzoo.held_out import Figures
from layerzoo.identity import TRAINED_ON, TrainedOn
from layerzoo.layer import EXECUTION
from layerzoo.lit import LitModel, read_checkpoint
from layerzoo.model import ModelConfig
from layerzoo.resumed import Resumed, same_start
from layerzoo.spec import Config, SpecError, at, plain, suggest

SUBCOMMANDS = ("fit", "validate", "test", "predict")
MAX_SEED = 2**32 - 1
"""NumPy's."""
LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "check_val_every_n_epoch": 1}
LEAST |= {"max_steps": -1, "max_epochs": -1, "num_sanity_val_steps": -1}
"""The least values of options of the trainer. Lightning does not check most of them."""
SHARES = {f"limit_{split}_batches": 0 for split in ("train", "val", "test", "predict")}
SHARES |= {"overfit_batches": 0, "val_check_interval": 1}
"""Options that are a number of batches, with the least one; a float is a share of all batches."""

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


class Parser(OneLine, LightningArgumentParser):
    """Reports an error as a SpecError of one line, and takes the help of an option from the
    docstring of its field."""

    def add_class_arguments(
        self, class_type: Any, nested_key: str | None = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """As jsonargparse's, but 4 is a number of batches, and never the share 4.0.

        Its type may have become `Union[float, int, None]`: typing takes the orders of a union for
        equal, and answers with the one that any module has used first.
        """
        added = super().add_class_arguments(class_type, nested_key, *args, **kwargs)
        for action in internals.actions(self):
            kinds = get_args(internals.type_of(action))
            if int in kinds and float in kinds:
                others = [kind for kind in kinds if kind not in (int, float)]
                internals.set_type(action, reduce(or_, others, int | float))
        config = class_type.Config if issubclass(class_type, Configured) else class_type
        if issubclass(config, Config):
            prefix = f"{nested_key}." if nested_key else ""
            self.configs = {**self.configs, prefix: config}
        return added

    configs: Mapping[str, type[Config]] = MappingProxyType({})
    """The configs whose fields are options, by what is before the field's name."""

    def format_help(self, *args: Any, **options: Any) -> str:
        known = {action.dest: action for action in internals.actions(self)}
        for prefix, config in self.configs.items():
            for name, doc in field_docs(config).items():
                if action := known.get(prefix + name):
                    action.help = doc.replace("%", "%%")
        return super().format_help(*args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.search(r'Parser key "([^"]+)"', message)
        place = f"{key[1]}: " if key else ""
        unknown = re.search(
            r"unrecognized arguments: --(\S+)|not accept option '(\S+)'|Option '(\S+)' is not",
            message,
        )
        path = re.search(r"Expected a dot import path string: (\S+)", message)
        if cause := foreign.spec_error(ex):
            raise SpecError(f"{place}{cause}") from None
        if unknown:
            word = next(filter(None, unknown.groups())).split("=")[0]
            raise SpecError(f"{place}{self.no_option(word)}") from None
        if path and place in ("", "data: "):
            known = [cls.__name__ for cls in list_tasks()]
            raise SpecError(f"{place}no task '{path[1]}'; {suggest(path[1], known)}") from None
        if path:
            way = "give an import path such as package.module.Class"
            raise SpecError(f"{place}no class '{path[1]}'; {way}") from None
        if foreign.UNION in message:
            message = foreign.plain_union(message)
        text = re.sub(r'^Parser key "[^"]+":', "", message.strip()).strip().splitlines()[0]
        text = re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", text)
        raise SpecError(f"{place}{text}") from None


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse options of the trainer that are of the right type and out of their range, before
    anything is built.

    Raises:
        SpecError: names the option.
    """
    for name, value in options.items():
        with at(f"trainer.{name}"):
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"must be finite, got {value}")
            if value is None:
                continue
            if name in LEAST and value < LEAST[name]:
                raise SpecError(f"must be at least {LEAST[name]}, got {value}")
            if name in SHARES and isinstance(value, int | float):
                low, share = SHARES[name], isinstance(value, float)
                if not (0 <= value <= 1 if share else value >= low):
                    way = f"batches, {low} or more, or a share of them, a float in [0, 1]"
                    raise SpecError(f"must be a number of {way}; got {value}")


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
            Figures(),
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
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_defaults={"logger": logger, "callbacks": callbacks},
            seed_everything_default=0,
            args=list(args),
            run=run,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        about = "Import path of what is trained, a TaskModule; its options are those of model."
        parser.add_argument("--module", type=str, default=MODULE, help=about)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is run: the parser of each takes a seventh of a second. It is without
        Lightning's own table of the figures, for `Figures` prints one."""
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
            if message := foreign.line(error):
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
            raise (foreign.spec_error(error) or error) from None

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand] if self.subcommand else self.config
        if "network" in options["model"]:
            with at("model.network"):
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
    for n in places:
        args[n] = config_path(args[n])
        read_yaml(args[n])
    try:
        TrainCLI(args)
    except OmegaConfBaseException as error:
        raise SpecError(_interpolation(error, [args[n] for n in places])) from None
    return 0


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
