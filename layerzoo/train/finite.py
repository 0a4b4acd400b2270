"""Ends training at the first number that is not finite, and says in which tensor it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from layerzoo.layer import Layer
from layerzoo.spec import Diverged

HELD_OUT = "loss/held_out"
LEAST_SCALE = 2.0**-24
"""Of a loss: below it the gradients overflow whatever a GradScaler does."""


class Finite(Callback):
    """Ends training with `Diverged` at the first loss, gradient or weight that is not finite.

    Before each update it looks at the losses since the last one and at all gradients, in one go;
    several processes decide together, or one would wait for the other. The message has the number
    of updates made, and where it is first: in a weight, in what a module puts out (the batches run
    once more to see that), or in a gradient. `16-mixed` skips an update whose gradients overflow,
    and scales the loss down: there gradients count once the scale is next to nothing.

    Weights that are not finite are never saved, so the checkpoint that they would replace stays.
    A run whose last held-out loss is not finite ends so, too, after its training: of that the
    weights are saved, for they are finite."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._forget()
        if stage == "fit":
            # A callback's `on_save_checkpoint` is not asked by a ModelCheckpoint of weights only.
            refuse = functools.partial(_refuse_weights, trainer)
            self.handle = pl_module.register_state_dict_pre_hook(refuse)

    def _forget(self) -> None:
        self.batches: list[tuple[Any, int]] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        skips = scaler is not None and scaler.get_scale() > LEAST_SCALE
        groups = [] if skips else optimizer.param_groups
        gradients = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        finite = _finite([*self.losses, *gradients])
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite)
        if not finite:
            raise Diverged(_agreed(trainer, self._explain(trainer, pl_module)))
        self._forget()

    def _explain(self, trainer: Any, module: Any) -> str:
        """What is not finite in this process, and where first; empty if nothing is."""
        with trainer.precision_plugin.train_step_context():
            output = _first_output(module, self.batches)
        at = f"at step {trainer.global_step}"
        loss = next((float(loss) for loss in self.losses if not loss.isfinite().all()), None)
        if loss is not None:
            weight = _first((name, p) for name, p in module.named_parameters())
            where = weight or output
            return f"loss {loss} {at}" + (f"; first in {where}" if where else "")
        # About in the order in which they are made.
        reverse = reversed([*module.named_parameters()])
        where = _first((name, p.grad) for name, p in reverse if p.grad is not None)
        return f"gradient {at} not finite; first in that of {where}" if where else ""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        _refuse_weights(trainer, pl_module)  # of the last update

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()
        self._forget()
        refuse_held_out(trainer.callback_metrics, trainer.global_step)


def refuse_held_out(figures: Mapping[str, Any], step: int) -> None:
    """Raise for a held-out loss that is not finite.

    Raises:
        Diverged: it is nan or infinite.
    """
    loss = float(figures.get(HELD_OUT, 0.0))
    if not math.isfinite(loss):
        raise Diverged(f"{HELD_OUT} {loss} at step {step}, of weights that are finite")


def _refuse_weights(trainer: Any, module: nn.Module, *_: Any) -> None:
    weights = [p.detach() for p in module.parameters()]
    if not _finite(weights):
        where = _first(module.named_parameters())
        raise Diverged(f"weights at step {trainer.global_step} not finite; first in {where}")


def _finite(tensors: Sequence[Tensor]) -> bool:
    tensors = [tensor for tensor in tensors if tensor.numel()]
    # A sum of squares takes a quarter of the time, but may overflow where no element does.
    orders = (2.0, math.inf)
    return not tensors or any(bool(get_total_norm(tensors, n).isfinite()) for n in orders)


def _first(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((f"parameter {name}" for name, t in tensors if not t.isfinite().all()), None)


def _first_output(module: Any, batches: Sequence[tuple[Any, int]]) -> str | None:
    """The part of a module that is the first to put out what is not finite, on these batches."""
    found: list[str] = []

    def look(name: str, part: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(first, Tensor) and not first.isfinite().all():
            kind = part.name if isinstance(part, Layer) else type(part).__name__
            found.append(f"the output of {name} ({kind})")

    parts = [(name, part) for name, part in module.named_modules() if name]
    hooks = [part.register_forward_hook(functools.partial(look, name)) for name, part in parts]
    with torch.no_grad():
        for batch, n in batches:
            module.training_step(batch, n)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def _agreed(trainer: Any, message: str) -> str:
    """One process's message, the same in all: of a loss, if any has one."""
    if trainer.world_size == 1:
        return message
    all_: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(all_, message)
    return max(all_, key=lambda text: (text.startswith("loss"), bool(text)))
