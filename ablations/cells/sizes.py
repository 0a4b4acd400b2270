"""Sizes of a config's model at its task's length."""

from __future__ import annotations

import functools
import json
from typing import Literal, NamedTuple

from layerzoo.spec import SpecError

from . import configs
from .configs import Tree

SizeName = Literal["parameters", "flops", "state_bytes"]


class Sizes(NamedTuple):
    """parameters; flops: of the forward pass, a token; state_bytes: after `length` tokens;
    memory_bytes: of these what is no buffer."""

    parameters: int
    flops: float
    state_bytes: int
    memory_bytes: int
    length: int

    @property
    def named(self) -> dict[str, float]:
        """As metrics.json names them."""
        figures = (self.parameters, self.state_bytes, self.memory_bytes, self.flops)
        return dict(zip(SIZE_NAMES, figures, strict=True))


SIZE_NAMES = ("parameters", "state_bytes", "state_bytes_memory", "flops_per_token")


def measure_sizes(config: Tree, length: int | None = None) -> Sizes:
    """Build the model, without memory for its weights.

    Args:
        length: T in place of the task's own.

    Raises:
        SpecError: it does not build.
    """
    T = configs.task_of(config).length if length is None else length
    model = configs.model_of(config)
    state = model.state_bytes(T)
    return Sizes(
        sum(p.numel() for p in model.parameters()),
        model.flops_per_token(T),
        state.total,
        state.memory,
        T,
    )


def sizes_of(config: Tree, length: int | None = None) -> Sizes:
    """`measure`, once for each network and length."""
    T = configs.task_of(config).length if length is None else length
    found = _cached_sizes(json.dumps(config["model"]["network"]), T)
    if isinstance(found, str):
        raise SpecError(found)
    return found


@functools.cache
def _cached_sizes(network: str, T: int) -> Sizes | str:
    try:
        return measure_sizes({"model": {"network": json.loads(network)}}, T)
    except SpecError as error:
        return str(error)
