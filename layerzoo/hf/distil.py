"""Distil: trains the memory of a converted model to stand in for full attention."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from layerzoo.data.random import below, bits
from layerzoo.data.task import IGNORE
from layerzoo.hf import modes
from layerzoo.layer import State
from layerzoo.model.language_model import unpack
from layerzoo.ops import accumulator_dtype
from layerzoo.spec import SpecError, error_at, plain, require
from layerzoo.train.module import TaskModule, within
from layerzoo.train.trained_on import TRAINED_ON

from .convert import load, source_digest
from .losses import KnownGradients, distance, kl_from_hidden

FAST = ("scales", "gate", "log_decay", "key_bias")
"""Parts of the names of the parameters that learn at `gate_lr` times the learning rate."""
STREAM = 16
"""Of the random numbers that a step draws, apart from those of the data."""
Batch = dict[str, Tensor]


class Distil(TaskModule):
    """Trains the memory of a converted model; everything else of it is frozen.

    loss = mean_n kl * KL(p'_n || p_n) - ce * log p_n[label_n] + l2 * mean_b d_nb,
    d_nb = |x_nb - x'_nb|^2 / |x'_nb|^2

    p_n: the model's distribution after token n, x_nb: the output of block b there; p', x': the
    same model's with full attention, which is the teacher. Checkpoints hold what is trained; at
    the end of training the whole model is saved in `model`, beside the logs.

    Raises:
        SpecError: the source is no converted model, or has no memory.
    """

    class Config(TaskModule.Config):
        source: str
        """The converted model is in this folder."""
        kl: float = 1.0
        """The divergence from full attention has this weight in the loss."""
        ce: float = 0.0
        """The cross entropy of the labels has this weight in the loss."""
        l2: float = 0.0
        """The distance of the blocks' outputs has this weight in the loss."""
        tokens: Literal["all", "past_window"] = "all"
        """All positions count in the loss, or only those past the window: a window that starts
        with the first token (of the document) does not reach them."""
        windows: Sequence[int] | None = None
        """Each optimiser step draws its window from these; null is the model's."""
        sinks: Sequence[int] | None = None
        """Each optimiser step draws its number of sinks from these; null is the model's."""
        mini_batches: Sequence[int] | None = None
        """Each optimiser step draws its mini-batch from these; null is the model's."""
        window_dropout: float = 0.0
        """With this probability a row goes without the window in a step."""
        gate_lr: float = 10.0
        """Scales, gates, decays and key biases learn at this multiple of lr."""
        piece: int | None = None
        """So many tokens are read at a time; null is all. The state goes on without gradient, so
        that memory is bounded, and no gradient reaches back beyond a piece."""
        checkpoint: bool = False
        """If true, the model keeps less for the backward pass and computes it again."""
        seed: int = 0
        """The steps draw their windows, sinks and mini-batches from this seed."""
        lr: float = 1e-3

        def check(self) -> None:
            super().check()
            for name in ("kl", "ce", "l2", "gate_lr", "seed"):
                within(name, getattr(self, name), 0)
            within("window_dropout", self.window_dropout, 0, 1)
            within("piece", 1 if self.piece is None else self.piece, 1)
            for name, least in (("windows", 1), ("sinks", 0), ("mini_batches", 1)):
                values = getattr(self, name)
                possible = values is None or (values and min(values) >= least)
                got = plain(values)
                require(possible, f"{name}: expected numbers from {least} on, got {got}")
            learns = self.kl or self.ce or self.l2
            require(learns, "kl, ce and l2 are all 0, so there is nothing to learn")

        @property
        def choices(self) -> dict[str, Sequence[int] | None]:
            """What each step draws, by the name of the model's option."""
            return {
                "window": self.windows,
                "sinks": self.sinks,
                "mini_batch": self.mini_batches,
            }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        with error_at("model.source"):
            self.model = load(config.source, torch.float32)
        self.source_digest = source_digest(config.source)
        self.model.checkpoint = config.checkpoint
        self.model.train().requires_grad_(False)
        for _, parameter in self.model.memory_parameters():
            parameter.requires_grad_()
        if not self.trained():
            raise SpecError(f"model.source: {config.source} has no memory to train")

    def digest(self) -> dict[str, str]:
        return {"source": self.source_digest}

    def trained(self) -> dict[str, Tensor]:
        """The parameters that need a gradient, by their names in the state dict."""
        named = self.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def rate(self, name: str) -> float:
        return self.config.gate_lr if any(part in name for part in FAST) else 1.0

    def on_fit_start(self) -> None:
        memory = {parameter for _, parameter in self.model.memory_parameters()}
        for name, parameter in self.trained().items():
            if parameter not in memory:
                raise SpecError(
                    f"model: {name} needs a gradient, but only the memory is trained; give a task "
                    f"without a readout, and freeze it"
                )
        length = getattr(getattr(self.trainer, "datamodule", None), "length", math.inf)
        widest = max(self.config.choices["window"] or [self.model.config.window])
        if self.config.tokens == "past_window" and length <= widest:
            raise SpecError(
                f"model.tokens: no token of {length} is past a window of {widest}; set a smaller "
                f"window or a larger data.length"
            )

    def draw(self) -> dict[str, int | None]:
        """What this optimiser step varies: a pure function of the seed and the step."""
        drawn: dict[str, int | None] = {}
        for n, (name, values) in enumerate(self.config.choices.items()):
            random = bits(self.config.seed, STREAM + n, self.global_step)
            drawn[name] = values[int(below(len(values), random)[0])] if values else None
        return drawn

    def counted(self, batch: Batch, window: int | None) -> Tensor:
        """Which positions `[B, T]` count in the loss."""
        tokens, documents = batch["tokens"], batch.get("documents")
        if self.config.tokens == "all":
            return torch.ones_like(tokens, dtype=torch.bool)
        if documents is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        else:
            position = unpack(tokens, documents)[1][1]
        return position >= (self.model.config.window if window is None else window)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        drawn = self.draw()
        batch = {n: batch[n] for n in ("tokens", "labels", "documents") if n in batch}
        batch["counted"] = self.counted(batch, drawn["window"])
        T = batch["tokens"].shape[1]
        piece = min(T, self.config.piece or T)
        if "documents" in batch and (piece < T or self.config.l2):
            name = "l2" if self.config.l2 else "piece"
            raise SpecError(f"model.{name}: cannot be with documents; set data.documents to false")
        N = max(1, int(batch["counted"].sum()))
        M = max(1, int((batch["counted"] & (batch["labels"] != IGNORE)).sum()))
        trained = [*self.trained().values()]
        grads: list[Tensor | None] = [None] * len(trained)
        wide = accumulator_dtype(*trained)  # in bf16-true, too
        parts = torch.zeros(3, dtype=wide, device=self.device)
        states: Sequence[State] = (None, None)
        for start in range(0, T, piece):
            cut = {name: x[:, start : start + piece] for name, x in batch.items()}
            new, piece_parts, states = self._gradients(cut, trained, states, N, M, drawn)
            grads = [
                b if a is None else a if b is None else a + b
                for a, b in zip(grads, new, strict=True)
            ]
            parts += piece_parts
        loss = parts @ parts.new_tensor([self.config.kl, self.config.ce, self.config.l2])
        names = ("loss/kl", "loss/ce", "loss/l2")[: 3 if self.config.l2 else 2]
        self.log("loss/train", loss, prog_bar=True, batch_size=N)
        self.log_dict(dict(zip(names, parts, strict=False)), batch_size=N)
        return KnownGradients.apply(loss, grads, *trained)

    def _gradients(
        self,
        batch: Batch,
        trained: list[Tensor],
        states: Sequence[State],
        N: int,
        M: int,
        drawn: dict[str, int | None],
    ) -> tuple[Sequence[Tensor | None], Tensor, Sequence[State]]:
        """A piece's gradients, its share of the means of (KL, cross entropy, distance) over N
        positions and M labels, and the states of teacher and student after it."""
        where, model = batch["counted"], self.model
        with torch.no_grad(), modes.mode(model, "full"):
            goal, teacher, goals = self._hidden(batch, states[0])
        # The backward pass is in here, because a checkpointed layer runs forward in it.
        varied = modes.vary(model, **drawn, drop=self.config.window_dropout)
        with modes.mode(model, "memory"), varied:
            h, student, outputs = self._hidden(batch, states[1])
            labels = batch["labels"][where]
            n, m = len(labels) / N, int((labels != IGNORE).sum()) / M
            head = model.get_output_embeddings().weight
            loss, kl, ce = kl_from_hidden(
                h[where], goal[where], labels, head, kl=self.config.kl * n, ce=self.config.ce * m
            )
            l2 = distance(outputs, goals, where) / N
            with torch.autocast(self.device.type, enabled=False):
                grads = torch.autograd.grad(loss + self.config.l2 * l2, trained, allow_unused=True)
        parts = torch.stack([n * kl, m * ce, l2.detach()]).to(accumulator_dtype(*trained))
        return grads, parts, tree_map(_detached, (teacher, student))

    def _hidden(self, batch: Batch, state: State) -> tuple[Tensor, State, list[Tensor]]:
        """Hidden states, the state, and, where they are compared, the outputs of the blocks."""
        trace: list[Tensor] = []
        more = {"trace": trace} if self.config.l2 else {}
        h, state = self.model.hidden(batch["tokens"], state, batch.get("documents"), **more)
        return h, state, trace

    def labelled(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with modes.mode(self.model, "memory"):
            return super().labelled(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state, trained = checkpoint["state_dict"], self.trained()
        checkpoint["state_dict"] = {name: state[name] for name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get(TRAINED_ON, {}).get("digest", {}).get("model.source")
        if before not in (None, self.source_digest):
            raise SpecError(
                f"checkpoint: its memory was trained in another model ({before[:12]}) than "
                f"model.source, {self.config.source} ({self.source_digest[:12]}); give its own"
            )
        own, trained, given = self.state_dict(), self.trained(), checkpoint["state_dict"]
        for name in sorted(trained.keys() | given.keys()):
            if name not in trained or name not in given or own[name].shape != given[name].shape:
                raise SpecError(
                    f"checkpoint: {name} is not what it is in model.source; give its own"
                )
        checkpoint["state_dict"] = {**own, **given}

    def on_fit_end(self) -> None:
        folder = self.trainer.log_dir if self.trainer.logger is not None else None  # of all ranks
        if folder is None or not self.trainer.is_global_zero:
            return
        path = Path(folder, "model")
        self.model.save_pretrained(path)
        for file in Path(self.config.source).glob("*token*.json"):  # the tokenizer goes with it
            shutil.copy(file, path)
        print(f"model: {path}")


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
