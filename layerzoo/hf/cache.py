"""The cache of a converted model: the states of its rows, all that it knows of the past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from layerzoo.generation.states import select_rows
from layerzoo.layer import State
from layerzoo.spec import SpecError

Read = Callable[[Tensor, State], tuple[Tensor, State]]


class MemoryCache:
    """What `generate` carries from step to step: a state, or one for each group of rows that have
    read as many tokens. Unlike a cache of keys it does not grow, nor can it be cut back."""

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self.groups: list[tuple[Tensor, State]] = []  # rows of the batch, and their state
        self.seen = 0  # tokens, paddings too

    @classmethod
    def of(cls, cache: Any) -> MemoryCache:
        """The given cache, or a new one in place of an empty one of transformers."""
        if isinstance(cache, cls):
            return cache
        if cache is not None and cache.get_seq_length():
            raise SpecError(
                f"cache: a {type(cache).__name__} that has read tokens is not of this model; "
                f"give what it returned, or none"
            )
        return cls()

    def get_seq_length(self, layer: int = 0) -> int:
        return self.seen

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in tree_leaves([state for _, state in self.groups]))

    def read(self, read: Read, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Let the model read tokens `[B, T]`; hidden states `[B, T, D]`, 0 at paddings."""
        B, T = tokens.shape
        real = None if mask is None else mask[:, -T:].bool().cpu()
        if self.seen and real is not None and not real.all():
            raise SpecError("attention_mask: only a prompt may be padded, not what follows it")
        if not self.groups and real is not None and not real.all():
            h = self._read_padded(read, tokens, real)
        elif len(self.groups) > 1:
            parts = [read(tokens[rows.to(tokens.device)], state) for rows, state in self.groups]
            h = parts[0][0].new_zeros(B, T, parts[0][0].shape[-1])
            for (rows, _), (part, _) in zip(self.groups, parts, strict=True):
                h[rows.to(h.device)] = part
            self.groups = [
                (rows, new) for (rows, _), (_, new) in zip(self.groups, parts, strict=True)
            ]
        else:
            h, state = read(tokens, self.groups[0][1] if self.groups else None)
            self.groups = [(torch.arange(B), state)]
        self.seen += T
        return h

    def _read_padded(self, read: Read, tokens: Tensor, real: Tensor) -> Tensor:
        B, T = tokens.shape
        first, count = real.int().argmax(1), real.sum(1)
        place = torch.arange(T)
        whole = (place >= first[:, None]) & (place < (first + count)[:, None])
        if not (whole == real).all() or not count.all():
            raise SpecError(
                "attention_mask: each row must be one run of tokens, padded at its ends alone"
            )
        h: Any = None
        for length in count.unique().tolist():
            rows = (count == length).nonzero().squeeze(1)
            where = first[rows, None] + torch.arange(length)
            part, state = read(tokens[rows[:, None], where], None)
            h = part.new_zeros(B, T, part.shape[-1]) if h is None else h
            h = h.index_put((rows[:, None].to(h.device), where.to(h.device)), part)
            self.groups.append((rows, state))
        return h

    def reorder_cache(self, beams: Tensor) -> None:
        """Row n of a beam search goes on from row beams[n]."""
        beams = beams.cpu()
        if len(self.groups) != 1:
            raise SpecError("beam search of prompts of unequal length: give them one by one")
        ((_, state),) = self.groups
        self.groups = [(torch.arange(len(beams)), select_rows(state, beams.tolist()))]

    def crop(self, length: int) -> None:
        raise SpecError("a memory cannot be cut back: assisted generation is not possible")
