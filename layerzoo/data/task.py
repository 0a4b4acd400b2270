"""Task: a LightningDataModule whose samples are a pure function of (seed, split, index)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from layerzoo.data.loading import IGNORE, Batches, ResumableLoader, loader
from layerzoo.data.random import bits
from layerzoo.metrics.accuracy import extrapolation
from layerzoo.spec import Config as BaseConfig
from layerzoo.spec import SpecError, require, suggest
from layerzoo.support.configured import Configured

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel

SPLITS = ("train", "val", "test")
Arrays = dict[str, NDArray[Any]]


class Task(Configured, LightningDataModule):
    """Yields batches `{tokens, labels, documents?, annotations...}`.

    Tokens and labels are `[B, T]`; labels are aligned with the tokens that must predict them,
    `IGNORE` elsewhere. An annotation says something of each position, `[B, T, ...]`, or of the
    whole row, `[B, 1, ...]`; the metrics get them at the labelled positions.

    A subclass extends `Config` by its own options, and defines `sample`, `metrics`, `chance` and
    `solve`. `vocab_size` and `length` are its fields of these names, or its constructor sets them.
    """

    class Config(BaseConfig):
        batch_size: int = 64
        """A batch holds this many samples, in each process."""
        seed: int = 0
        """The samples are hashed from this seed. The seed of the weights is `seed_everything`."""
        train_samples: int = 100_000
        """The training split has this many samples. Training passes over them in order, and then
        again."""
        val_samples: int = 1000
        """The validation split has this many samples."""
        test_samples: int = 3000
        """The test split has this many samples."""
        lengths: Sequence[int] | str | None = None
        """The model is tested at each of these lengths, `64,128` or a list, and not at the
        task's own length."""
        shuffled: bool = False
        """If true, another sample's context stands before the question and answer of this one.
        It is a control: what is still answered above chance leaks from somewhere."""
        num_workers: int = 0
        """This many processes make batches; with 0 the training process makes them."""

        settings: ClassVar[Mapping[str, dict[str, Any]]] = MappingProxyType({})
        """Published settings: values of fields by name. A config that has some has a field
        `setting`, which names one of them."""

        def check(self) -> None:
            super().check()
            require(self.batch_size >= 1, f"batch_size: must be at least 1, got {self.batch_size}")
            for name in ("num_workers", "seed"):
                value = getattr(self, name)
                require(value >= 0, f"{name}: must not be negative, got {value}")
            require(
                self.train_samples >= self.batch_size,
                f"train_samples: {self.train_samples} do not fill one batch of {self.batch_size}",
            )
            for split in SPLITS:  # beyond are the samples whose contexts the control takes
                count = getattr(self, f"{split}_samples")
                require(
                    1 <= count <= 2**32, f"{split}_samples: must be in [1, {2**32}], got {count}"
                )
            if isinstance(self.lengths, str):
                require(
                    all(word.strip().isdecimal() for word in self.lengths.split(",")),
                    f"lengths: expected numbers, as in 64,128, got '{self.lengths}'",
                )

        def with_setting(self) -> Self:
            """The config with the values of its published setting in place of the defaults.

            Raises:
                SpecError: no such setting, or a field has a value that the setting excludes.
            """
            name, known = getattr(self, "setting", None), self.settings
            if name is None:
                return self
            require(name in known, f"setting: no '{name}'; {suggest(name, known)}")
            values, defaults = known[name], {f.name: f.default for f in self.fields()}
            for field, value in values.items():
                given = getattr(self, field)
                require(
                    given in (value, defaults[field]),
                    f"{field}: {given}, but setting {name} has {value}; leave one of them out",
                )
            return dataclasses.replace(self, **values, setting=None)

    config: Any
    """The config, with the values of a published setting where it names one."""
    cases: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Small options for the tests, one for each thing that the task can do."""
    in_context: ClassVar[bool] = True
    """Whether the answers stand in the context; if not, shuffling it is no control."""

    vocab_size: int
    length: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config = config.with_setting()
        for name in ("vocab_size", "length"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
        self.batch_size, self.seed, self.shuffled = config.batch_size, config.seed, config.shuffled
        self.samples = {split: getattr(config, f"{split}_samples") for split in SPLITS}
        lengths = config.lengths or ()
        words = lengths.split(",") if isinstance(lengths, str) else lengths
        self.lengths = [int(word) for word in words]
        self._parts: dict[str, dict[str, Task]] = {}
        self.require(
            self.in_context or not self.shuffled,
            "shuffled: its answers do not stand in the context, so there is nothing to shuffle",
        )

    @classmethod
    def located(cls, error: SpecError) -> str:
        return f"data: {cls.__name__}: {error}"

    @classmethod
    def require(cls, condition: bool, message: str) -> None:
        """Refuse options that cannot be, for a reason that the constructor finds.

        Raises:
            SpecError: the condition does not hold.
        """
        if not condition:
            raise SpecError(cls.located(SpecError(message)))

    def varied(self, **changes: Any) -> Self:
        """A task with the same options but for these. What a setting set can be changed."""
        return type(self)(**{**self.given.with_setting().field_values(), **changes})

    # What a task is made of

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        """The samples of these indices, stacked: `[len(index), T]` each."""
        raise NotImplementedError

    def metrics(self) -> list[Metric]:
        """What to measure on held-out data (see `layerzoo.metrics`)."""
        raise NotImplementedError

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing without the context; None if there is no such number."""
        return None

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The answers to one sample, `[T]`, from its tokens alone; what stands where there is no
        label does not matter. It proves that the task can be solved."""
        raise NotImplementedError

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        """Where the tokens are the question and not its context, `[B, T]`: the shuffled control
        keeps these."""
        return sample["labels"] != IGNORE

    def divide(self, split: str) -> dict[str, Task]:
        """The parts of a split by name, `what=which`. A batch is of one part; held-out figures
        are told apart by part."""
        if split == "test" and self.lengths:
            return {f"length={n}": self.varied(length=n, lengths=None) for n in self.lengths}
        return {"": self}

    def order(self) -> NDArray[np.int64]:
        """The part of each training batch, by number: in shuffled order, each as often as it has
        batches."""
        counts = [part.batches("train") for part in self.parts("train").values()]
        order = np.repeat(np.arange(len(counts)), counts)
        return order[np.argsort(bits(self.seed, len(SPLITS), np.arange(len(order))))]

    def summary(
        self, split: str, results: dict[str, dict[str, Tensor]]
    ) -> dict[str, Tensor | float]:
        """The figures to log of a split, from those of its parts: the means over the parts, and
        each as `figure/part`; for `lengths` also how far accuracy extrapolates."""
        if len(results) == 1:
            (figures,) = results.values()
            return {**figures}
        lists = [*results.values()]
        out: dict[str, Tensor | float] = {
            name: sum(figures[name] for figures in lists) / len(lists)
            for name in lists[0]
            if all(name in figures for figures in lists)
        }
        for part, figures in results.items():
            out |= {f"{name}/{part}": value for name, value in figures.items()}
        if split == "test" and self.lengths:
            out |= extrapolation(results, self.length)
        return out

    def readout(self, model: LanguageModel) -> nn.Module | None:
        """A head of the task's own, trained with the model: called with the final hidden states
        `[B, T, D]` and where labels are, it returns the logits there, `[N, vocab]`."""
        return None

    def attach(self, model: LanguageModel) -> None:
        """Check the model against the task; a task may read what it needs of the model."""
        self.require(
            model.config.vocab_size >= self.vocab_size,
            f"vocab_size: tokens run to {self.vocab_size - 1}, beyond the model's vocabulary of "
            f"{model.config.vocab_size}; set model.network.vocab_size to {self.vocab_size}",
        )

    def digest(self) -> dict[str, str]:
        """What the task reads, files for example: by the option that names it, the SHA-256 of the
        contents in hex. Checkpoints, records and the cells of grids are told apart by it."""
        return {}

    # What is made of it

    def parts(self, split: str) -> dict[str, Task]:
        """`divide`, once."""
        if split not in self._parts:
            self._parts[split] = self.divide(split)
        return self._parts[split]

    def batches(self, split: str) -> int:
        """How many batches a split has; training leaves the last incomplete one out."""
        whole, rest = divmod(self.samples[split], self.batch_size)
        return whole + (rest > 0 and split != "train")

    def batch(self, split: str, index: Sequence[int]) -> dict[str, Tensor]:
        at = np.asarray(index, np.int64)
        arrays = self.sample(split, at)
        if self.shuffled:
            other = self.sample(split, at + 2**32)["tokens"]  # none of any split
            arrays["tokens"] = np.where(self.question(arrays), arrays["tokens"], other)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _loader(self, parts: list[Task], split: str, order: NDArray[np.int64]) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return loader(Batches(parts, split, order), rank, world, self.config.num_workers)

    def _held_out(self, split: str) -> list[DataLoader[Any]]:
        return [
            self._loader([part], split, np.zeros(part.batches(split), np.int64))
            for part in self.parts(split).values()
        ]

    def train_dataloader(self) -> DataLoader[Any]:
        loader = self._loader([*self.parts("train").values()], "train", self.order())
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        whole = len(loader)
        loader.limit = int(whole * limit) if isinstance(limit, float) else min(whole, limit)
        return loader

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._held_out("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test split at the task's own length."""
        return self._loader([self], "test", np.zeros(self.batches("test"), np.int64))


def list_tasks() -> list[type[Task]]:
    """Every task that is imported, by name."""

    def under(cls: type[Task]) -> list[type[Task]]:
        return [task for sub in cls.__subclasses__() for task in (sub, *under(sub))]

    def whole(cls: type[Task]) -> bool:
        return cls.sample is not Task.sample or cls.divide is not Task.divide

    found = {cls for cls in under(Task) if whole(cls) and not cls.__name__.startswith("_")}
    return sorted(found, key=lambda cls: cls.__name__)
