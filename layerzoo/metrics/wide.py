"""What every metric shares: accumulators that stay wide, whatever precision the model has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from layerzoo.ops import accumulator_dtype


class WideMetric(Metric):
    """A metric of counts in int64 and sums in float64, so that both are exact to 2^53.

    It follows the module that holds it to another device, but not to another dtype: Lightning's
    `bf16-true` and `16-true` cast the whole module, and in bfloat16 a count of ones stops at 256.
    MPS has no float64; sums are in float32 there. `compute` returns Python's floats.
    """

    def add_counts(self, name: str, *shape: int) -> None:
        """A state of zeros in int64; those of several processes are added."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def add_sums(self, name: str, *shape: int) -> None:
        """The same in float64."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(device_alone(fn), exclude_state)


class WideDict(nn.ModuleDict):
    """Metrics by name that keep their dtypes, also those that are no `WideMetric`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(device_alone(fn), recurse)


def device_alone(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` gives its tensors, without a change of their dtype."""

    def move(x: Tensor) -> Tensor:
        device = fn(torch.empty(0, dtype=torch.int64, device=x.device)).device
        narrowed = x.dtype == torch.float64 and device.type == "mps"
        return x.to(device, torch.float32 if narrowed else x.dtype)

    return move


def wide(value: Any, device: torch.device) -> Tensor:
    """A figure as Lightning logs it without loss: it makes float32 of Python's numbers."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(value, device=device).detach().to(dtype)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which labels are predicted, `[N]`. Logits that hold nan predict nothing: their argmax is
    the place of the nan."""
    best, at = logits.max(-1)
    return (at == labels) & ~best.isnan()


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each label, `[N]`, in float32, float64 for float64."""
    return F.cross_entropy(logits.to(accumulator_dtype(logits)), labels, reduction="none")


def ratio(part: float, whole: float) -> float:
    """part / whole; nan if there is nothing."""
    return part / whole if whole else math.nan


def exp(x: float) -> float:
    """e^x; inf where that is too large for a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
