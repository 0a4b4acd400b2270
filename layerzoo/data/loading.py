"""Loaders of batches: resumable in mid-epoch, and dealt to processes without a repeated sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from layerzoo.data.task import Task

IGNORE = -100
"""The label of a position that is not scored."""
BLANK = -1
"""The number of a batch without labels, for a process that has fewer batches than another."""


class Batches(Dataset[Any]):
    """The batches of a split: the n-th is the next one of part `order[n]`, whose batches come
    around again if there are too few."""

    def __init__(self, parts: Sequence[Task], split: str, order: NDArray[np.int64]) -> None:
        self.parts, self.split, self.order = parts, split, order
        self.turn = np.zeros_like(order)
        for part in range(len(parts)):
            where = order == part
            self.turn[where] = np.arange(where.sum())

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        part = self.parts[self.order[n]]
        first = self.turn[n] % part.batches(self.split) * part.batch_size
        last = min(first + part.batch_size, part.samples[self.split])
        batch = part.batch(self.split, range(first, last))
        if n == BLANK:
            batch["labels"].fill_(IGNORE)
        return batch


class ShareOfBatches(DistributedSampler[int]):
    """Deals batch numbers to processes in turn. Training drops the last incomplete round;
    evaluation fills it with blanks, so that every process has as many batches and none counts
    twice. (A DistributedSampler, so that Lightning leaves it alone.)"""

    start = 0
    """The first batch of the next pass, which is a resumed one."""

    def __init__(self, batches: Batches, rank: int, world: int, training: bool) -> None:
        super().__init__(batches, num_replicas=world, rank=rank, shuffle=False)
        numbers = np.arange(len(batches))
        if training:
            numbers = numbers[: len(numbers) // world * world]
        else:
            blanks = np.full(-len(numbers) % world, BLANK)
            numbers = np.concatenate([numbers, blanks])
        self.numbers = numbers[rank::world].tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers[self.start :])


def _identity(batch: Any) -> Any:
    return batch


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that Lightning saves in a checkpoint: a resumed run sees the next batch.

    Its pass ends after `limit` batches, where the trainer has such a limit.
    """

    done = 0
    limit: int | None = None

    def __iter__(self) -> Any:
        self.done = getattr(self.sampler, "start", 0)
        batches = super().__iter__()
        if isinstance(self.sampler, ShareOfBatches):
            self.sampler.start = 0  # only now: with worker processes it has been iterated twice
        for batch in batches:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % (self.limit or len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert isinstance(self.sampler, ShareOfBatches)
        self.sampler.start = state["done"]


def loader(batches: Batches, rank: int, world: int, num_workers: int) -> ResumableLoader:
    deal = ShareOfBatches(batches, rank, world, training=batches.split == "train")
    workers = num_workers if batches.split == "train" else 0
    return ResumableLoader(
        batches,
        batch_size=None,
        sampler=deal,
        collate_fn=_identity,
        num_workers=workers,
        # Its own, else every pass would draw from the random state that the model draws from.
        generator=torch.Generator(),
    )
