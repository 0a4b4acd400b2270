"""Task: a LightningDataModule whose samples are a pure function of (seed, split, index)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchmetrics import Metric

from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel

SPLITS = ("train", "val", "test")
IGNORE = -100
"""The label of a position that is not scored."""


class Task(LightningDataModule):
    """Yields batches `{tokens, labels, documents?, annotations...}`, each `[B, T]`.

    Labels are aligned with the tokens that must predict them; `IGNORE` elsewhere.

    Args:
        batch_size: samples a batch.
        seed: of the data, apart from the seed of the initialisation (`seed_everything`).
        train_samples, val_samples, test_samples: size of the splits; training passes over its
            split in order and then again.
        num_workers: processes that make batches; 0 makes them in the training process.
    """

    vocab_size: int

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        train_samples: int,
        val_samples: int,
        test_samples: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.samples: dict[str, int] = dict(
            zip(SPLITS, (train_samples, val_samples, test_samples), strict=True)
        )
        self.require(batch_size >= 1, f"batch_size: must be at least 1, got {batch_size}")
        self.require(num_workers >= 0, f"num_workers: must not be negative, got {num_workers}")
        self.require(seed >= 0, f"seed: must not be negative, got {seed}")
        self.require(
            train_samples >= batch_size,
            f"train_samples: {train_samples} do not fill one batch of {batch_size}",
        )
        for split, count in self.samples.items():
            self.require(count >= 1, f"{split}_samples: must be at least 1, got {count}")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise SpecError(f"data: {type(self).__name__}: {message}")

    def sample(self, split: str, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The samples of these indices, stacked: `[len(index), T]` each."""
        raise NotImplementedError

    def metrics(self) -> list[Metric]:
        """What to measure on held-out data (see `layerzoo.metrics`)."""
        raise NotImplementedError

    def attach(self, model: LanguageModel) -> None:
        """Check the model against the task; a task may read what it needs of the model."""
        self.require(
            model.config.vocab_size >= self.vocab_size,
            f"vocab_size: tokens run to {self.vocab_size - 1}, beyond the model's vocabulary of "
            f"{model.config.vocab_size}; set model.network.vocab_size to {self.vocab_size}",
        )

    def batch(self, split: str, index: Sequence[int]) -> dict[str, Tensor]:
        arrays = self.sample(split, np.asarray(index, np.int64))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def loader(self, split: str) -> DataLoader[Any]:
        samples = _Samples(self, split)
        batches = _Batches(SequentialSampler(samples), self.batch_size, split == "train")
        workers = self.num_workers if split == "train" else 0
        return ResumableLoader(
            samples, batch_sampler=batches, collate_fn=_identity, num_workers=workers
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")

    predict_dataloader = test_dataloader


def _identity(batch: Any) -> Any:
    return batch


class _Samples(Dataset[Any]):
    def __init__(self, task: Task, split: str) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return self.task.samples[self.split]

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        return self.task.batch(self.split, index)


class _Batches(BatchSampler):
    """A batch sampler that can start later, once."""

    start = 0

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that Lightning saves in a checkpoint: a resumed run sees the next batch."""

    done = 0

    def __iter__(self) -> Any:
        self.done = getattr(self.batch_sampler, "start", 0)
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        batches = self.batch_sampler
        assert isinstance(batches, _Batches)
        batches.start = state["done"]
