"""Generation on a model's state: batches of prompts that run in step, and a stream of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from layerzoo.generation.sampling import Sampling
from layerzoo.generation.states import batch_size, check_state, select_rows, to_device
from layerzoo.layer import State
from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from jaxtyping import Int

    from layerzoo.model import LanguageModel

Prompt = Sequence[int] | Tensor
PIECE = 1024
"""Tokens of a prompt that are read at a time."""


@torch.no_grad()
def read_tokens(
    model: LanguageModel, tokens: Int[Tensor, "B T"], state: State = None, piece: int = PIECE
) -> State:
    """The state after the tokens, which are read `piece` at a time. So a long prompt takes no more
    memory than a piece, and by the law the state is the same."""
    if piece < 1:
        raise SpecError(f"piece: must be at least 1 token, got {piece}")
    state = model.init_state(len(tokens)) if state is None else state
    for part in tokens.split(piece, 1) if tokens.shape[1] else ():
        _, state = model.hidden(part, state)
    return state


class Batch:
    """Prompts of one length, which run in step.

    state: has read all but the newest token of each row. unread: that token, `[B, 1]`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "B T"],
        how: Sampling,
        seeds: Sequence[tuple[int, int]],
        state: State,
        piece: int,
    ) -> None:
        self.model, self.how = model, how
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.state = read_tokens(model, tokens[:, :-1], state, piece)
        self.unread = tokens[:, -1:]

    @torch.no_grad()
    def step(self) -> list[int]:
        """A new token of every row."""
        h, self.state = self.model.hidden(self.unread, self.state)
        logits = self.model.head(h[:, -1])
        if not math.isfinite(float(logits.float().sum())):
            raise SpecError("the logits are not finite: the model's weights or state are broken")
        sampled = self.how.temperature > 0
        draws = [generator.random() for generator in self.generators] if sampled else []
        self.unread = self.how.choose(logits, draws)[:, None]
        return self.unread[:, 0].tolist()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.state, self.unread = select_rows(self.state, rows), self.unread[rows]
        self.generators = [self.generators[n] for n in rows]


class Stream(Iterator[int]):
    """The new tokens of one prompt as they come; see `stream`."""

    def __init__(self, batch: Batch, max_new_tokens: int | None, stop: Collection[int]) -> None:
        self._batch, self._left, self._stop = batch, max_new_tokens, stop

    def __next__(self) -> int:
        if self._left == 0:
            raise StopIteration
        (token,) = self._batch.step()
        left = None if self._left is None else self._left - 1
        self._left = 0 if token in self._stop else left
        return token

    @property
    def state(self) -> State:
        """The state so far: it has read the prompt and all new tokens but the newest, `unread`.
        It stays what it is when the stream goes on: keep it, and go back to it whenever."""
        return self._batch.state

    @property
    def unread(self) -> int:
        """The newest token (at first the prompt's last). To go on from `state`, a prompt must
        begin with it: ``stream(model, [s.unread], state=s.state)``."""
        return int(self._batch.unread)


def stream(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    seed: int = 0,
    index: int = 0,
    state: State = None,
    piece: int = PIECE,
) -> Stream:
    """Continue one prompt: an iterator over the new tokens. See `generate`, which is the same for
    many prompts; this call reads the prompt.

    Args:
        max_new_tokens: default None, endless.
        index: place of the prompt among those of `generate`, for the same sample.
    """
    how = Sampling(temperature, top_k, top_p)
    check_prompts(model, max_new_tokens, stop, seed)
    tokens = torch.tensor([ids_of(model, prompt, 0)], device=model.embedding.weight.device)
    state = start(model, state, 1)
    return Stream(Batch(model, tokens, how, [(seed, index)], state, piece), max_new_tokens, stop)


def generate(
    model: LanguageModel,
    prompts: Tensor | Sequence[Prompt],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    seed: int = 0,
    state: State = None,
    piece: int = PIECE,
    on_token: Callable[[int, int], object] | None = None,
) -> list[Tensor]:
    """Continue prompts: the prompt is read in pieces, then every step reads and writes one token.

    Prompts of equal length run as one batch. Each samples with a generator of its own, seeded by
    (seed, its place): what it becomes depends neither on the others nor on their grouping.

    Args:
        prompts: rows of token ids.
        temperature, top_k, top_p: see `Sampling`.
        stop: token ids; a row ends with the first of them that it samples.
        state: to continue, of one row, or of a row per prompt; by default none has been read.
        piece: tokens of a prompt that are read at a time.
        on_token: called with a prompt's place and its new token, as they come.

    Returns:
        Prompt and continuation of every prompt, in order, as 1-d tensors. For the state, see
        `stream`.

    Raises:
        SpecError: an empty prompt, a token outside the vocabulary, an option out of range, or a
            state that is not this model's.
    """
    how = Sampling(temperature, top_k, top_p)
    check_prompts(model, max_new_tokens, stop, seed)
    rows = [ids_of(model, prompt, n) for n, prompt in enumerate(prompts)]
    state = start(model, state, len(rows))
    device = model.embedding.weight.device
    groups: dict[int, list[int]] = {}  # by length
    for n, row in enumerate(rows):
        groups.setdefault(len(row), []).append(n)
    for group in groups.values():
        tokens = torch.tensor([rows[n] for n in group], device=device)
        own = None if state is None else select_rows(state, group)
        batch = Batch(model, tokens, how, [(seed, n) for n in group], own, piece)
        for _ in range(max_new_tokens):
            new = batch.step()
            for n, token in zip(group, new, strict=True):
                rows[n].append(token)
                if on_token is not None:
                    on_token(n, token)
            going = [place for place, token in enumerate(new) if token not in stop]
            if len(going) < len(new):
                group = [group[place] for place in going]
                if not group:
                    break
                batch.keep(going)
    return [torch.tensor(row, device=device) for row in rows]


def check_prompts(
    model: LanguageModel, max_new_tokens: int | None, stop: Collection[int], seed: int
) -> None:
    """Refuse options that are out of range."""
    vocab = model.config.vocab_size
    if max_new_tokens is not None and max_new_tokens < 0:
        raise SpecError(f"max_new_tokens: must not be negative, got {max_new_tokens}")
    if seed < 0:
        raise SpecError(f"seed: must not be negative, got {seed}")
    for token in stop:
        if not 0 <= token < vocab:
            raise SpecError(f"stop: {token} is outside the vocabulary 0..{vocab - 1}")


def ids_of(model: LanguageModel, prompt: Prompt, n: int) -> list[int]:
    """The token ids of prompt n."""
    given = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    ids, vocab = [int(token) for token in given], model.config.vocab_size
    if not ids:
        raise SpecError(f"prompt {n} is empty: give at least one token")
    if min(ids) < 0 or max(ids) >= vocab:
        raise SpecError(f"prompt {n} has a token outside the vocabulary 0..{vocab - 1}")
    return ids


def start(model: LanguageModel, state: State, rows: int) -> State:
    """The state that so many prompts continue, a row each."""
    if state is None or rows == 0:
        return None
    check_state(model, state)
    size = batch_size(state)
    if size not in (1, rows):
        raise SpecError(f"state: has {size} rows for {rows} prompts; give one, or one a prompt")
    state = to_device(state, model.embedding.weight.device)
    return state if size == rows else select_rows(state, [0] * rows)
