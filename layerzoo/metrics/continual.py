"""Forgetting and transfer across training phases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerzoo.metrics.wide import WideMetric

UNKNOWN = -math.inf


class ContinualMatrix(WideMetric):
    """Of K tasks, trained one after another: R[i, j] = the accuracy on task j after phase i, for
    i = 0..K (0 is before training) and j = 1..K; `continual_matrix/phase=i/task=j`.

    - `continual/forgetting_max_minus_last/task=j` = max of R[i, j] over i = 1..K-1, minus R[K, j],
      for j < K; without `/task=j` their mean. Phases before task j count to the maximum; the
      baseline does not.
    - `continual/backward_transfer` = mean of R[K, j] - R[j, j] over j < K.
    - `continual/forward_transfer` = mean of R[j-1, j] - R[0, j] over j > 1.
    - `continual/average_accuracy` = mean of R[K, j] over all j.

    A figure is there once all that it is made of is known. Source: Lopez-Paz and Ranzato 2017,
    arXiv 1706.08840 (transfer, average); Chaudhry et al. 2018, arXiv 1801.10112 (forgetting).
    Across processes the maximum of an entry counts, so that it does not matter whether one or
    all of them are updated with it.

    Args:
        phases: K, at least 2.
    """

    accuracies: Tensor

    def __init__(self, phases: int, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        if phases < 2:
            raise ValueError(f"phases: must be at least 2, got {phases}")
        self.phases = phases
        unknown = torch.full((phases + 1, phases), UNKNOWN, dtype=torch.float64)
        self.add_state("accuracies", unknown, dist_reduce_fx="max")

    def update(self, phase: int, accuracies: Tensor | Sequence[float]) -> None:
        """Set the row of a phase, `[K]`; nan is not measured and leaves what is known."""
        row = self.accuracies.new_tensor([float(accuracy) for accuracy in accuracies])
        self.accuracies[phase] = torch.where(row.isnan(), self.accuracies[phase], row)

    def compute(self) -> dict[str, float]:
        K = self.phases
        R = self.accuracies.masked_fill(self.accuracies == UNKNOWN, math.nan)  # nan spreads
        last, own = R[K], R[1:].diagonal()
        forgetting = (R[1:K].amax(0) - last)[:-1]
        out = {
            f"continual_matrix/phase={i}/task={j + 1}": R[i, j]
            for i in range(K + 1)
            for j in range(K)
        }
        name = "continual/forgetting_max_minus_last"
        out |= {f"{name}/task={j + 1}": value for j, value in enumerate(forgetting)}
        out |= {
            name: forgetting.mean(),
            "continual/backward_transfer": (last - own)[:-1].mean(),
            "continual/forward_transfer": (R[:K].diagonal() - R[0])[1:].mean(),
            "continual/average_accuracy": last.mean(),
        }
        return {name: float(value) for name, value in out.items() if not value.isnan()}
