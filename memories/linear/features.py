"""Feature maps of linear attention: phi(q) and phi(k) take the place of q and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class FeatureMap(NamedTuple):
    """phi, its number of features for K channels, and what is never negative: phi(q) phi(k), even
    each of their products alone (with a decay per channel it takes that)."""

    phi: Callable[[Tensor], Tensor]
    size: Callable[[int], int] = lambda K: K
    positive: bool = True
    each_positive: bool = True


def taylor(x: Tensor) -> Tensor:
    """1, x_i, x_i^2 / sqrt(2) and x_i x_j (i < j): phi(q) phi(k) = 1 + q k + (q k)^2 / 2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = x.new_ones(len(i)).masked_fill(i == j, 0.5**0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight), -1)


FEATURE_MAPS = {
    "identity": FeatureMap(lambda x: x, positive=False, each_positive=False),
    "elu1": FeatureMap(lambda x: F.elu(x) + 1),
    "relu": FeatureMap(F.relu),
    "softmax": FeatureMap(lambda x: x.softmax(-1)),
    "taylor": FeatureMap(taylor, lambda K: 1 + K + K * (K + 1) // 2, each_positive=False),
}
