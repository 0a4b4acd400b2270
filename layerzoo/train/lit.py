"""The LightningModule that trains a `LanguageModel`, and what it saved."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.ops import accumulator_dtype
from layerzoo.spec import SpecError, error_at
from layerzoo.train.module import TaskModule
from layerzoo.train.older_checkpoints import of_today
from layerzoo.train.trained_on import TRAINED_ON, digest_weights, first_difference


class LitModel(TaskModule):
    """Trains a `LanguageModel` on a task with AdamW.

    Raises:
        SpecError: when a new run starts, `init` cannot be read or is of another network.
    """

    class Config(TaskModule.Config):
        network: ModelConfig
        """The language model has this config."""
        impl: Literal["auto", "recurrent", "chunked", "triton"] = "auto"
        """The layers run in this way; the function is the same."""
        checkpoint: bool = False
        """If true, the layers keep less for the backward pass and compute it again, which does not
        change the function."""
        compiled: bool = False
        """If true, the layers compile their inner loops, which does not change the function. It
        needs a C++ compiler."""
        init: str | None = None
        """A new run starts from the weights at this path: of a checkpoint, or of a run's folder,
        whose newest checkpoint is taken. Its network must have the same config. A run that is
        resumed has its own weights, and does not read these again."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.started: str | None = None  # the digest of the weights of `init`
        with error_at("model.network"):
            self.model: LanguageModel = LanguageModel(
                config.network,
                impl=config.impl,
                checkpoint=config.checkpoint,
                compiled=config.compiled,
            )

    def begin(self) -> None:
        """Take the weights of `init`, once, if there is one."""
        init = self.config.init
        if init is not None and self.started is None:
            with error_at("model.init"):
                weights = initial_weights(init, self.model.config)
                load_weights(self.model, weights, init)
            self.started = digest_weights(weights)

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # only now is it known
            self.begin()

    def digest(self) -> dict[str, str]:
        return {} if self.started is None else {"init": self.started}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.started = checkpoint.get(TRAINED_ON, {}).get("digest", {}).get("model.init")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels, _ = self.labelled(batch)
        # The mean; of a batch without any label it is 0, not nan.
        wide = logits.to(accumulator_dtype(logits))
        loss = F.cross_entropy(wide, labels, reduction="sum") / max(1, len(labels))
        self.log("loss/train", loss, prog_bar=True, batch_size=len(labels))
        return loss


DAMAGED = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, EOFError, ImportError, ArithmeticError, AssertionError, MemoryError),
)
"""What reading arbitrary bytes as a checkpoint raises: pickle promises no less."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that `layerzoo fit` wrote.

    Raises:
        SpecError: the file is missing, cut off, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for part in (checkpoint["state_dict"], hyper := checkpoint["hyper_parameters"]):
            len(part)  # both are mappings, or this is another program's file
        if "network" in hyper:
            with error_at(f"checkpoint {path}: network"):
                hyper["network"] = of_today(hyper["network"])
    except OSError as error:
        raise SpecError(f"checkpoint {path}: cannot be read: {error.strerror}") from None
    except DAMAGED as error:
        raise SpecError(
            f"checkpoint {path}: is damaged, or not one that layerzoo wrote "
            f"({type(error).__name__}); use another, such as an earlier step's"
        ) from None
    return checkpoint


def read_weights(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights of the language model of a checkpoint of `LitModel`.

    Raises:
        SpecError: the checkpoint is damaged, or another module's.
    """
    checkpoint = read_checkpoint(path)
    if "network" not in checkpoint["hyper_parameters"]:
        raise SpecError(f"checkpoint {path}: is not of a language model, but of another module")
    config = ModelConfig.from_fields(checkpoint["hyper_parameters"]["network"])
    prefix = "model."
    return config, {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


def load_weights(model: LanguageModel, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise SpecError(
            f"checkpoint {path}: its weights are not of its config: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None


def initial_weights(path: str | Path, network: ModelConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint, or of the newest one in a run's folder, to start a run of this
    network from.

    Raises:
        SpecError: there is none, it is damaged, or of a network with another config.
    """
    from layerzoo.train.find_checkpoint import find_checkpoint

    path = find_checkpoint(path)
    config, weights = read_weights(path)
    other = first_difference(network.to_fields(), config.to_fields(), "model.network")
    if other:
        place, now, before = other
        raise SpecError(
            f"{place}: {now}, but the network of {path} has {before}; give the same network"
        )
    return weights


def load_model(path: str | Path, impl: str = "auto") -> LanguageModel:
    """The language model of a checkpoint of `LitModel`, on the CPU, in evaluation mode.

    Raises:
        SpecError: the checkpoint is damaged, or another module's.
    """
    config, weights = read_weights(path)
    with error_at(f"checkpoint {path}"):
        model = LanguageModel(config, impl=impl)
    load_weights(model, weights, path)
    return model.eval()
