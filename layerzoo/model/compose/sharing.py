"""Projections that children of a composition share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from layerzoo.layer import Layer
from layerzoo.model.compose.reset import Reset
from layerzoo.shell import QKV
from layerzoo.spec import SpecError


class Grouped(nn.Module):
    """A projection to fewer heads `[B, T, G K]`, each repeated for the heads that read it."""

    def __init__(self, theirs: nn.Linear, heads: int, repeats: int) -> None:
        super().__init__()
        self.theirs, self.heads, self.repeats = theirs, heads, repeats

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(self.theirs(x))

    def spread(self, projected: Tensor) -> Tensor:
        heads = projected.unflatten(-1, (self.heads, -1))
        return heads.repeat_interleave(self.repeats, -2).flatten(-2)


def share(name: str, first: Layer, child: Layer) -> None:
    """Make a projection of the child the first child's; it is registered there alone. Keys and
    values of grouped heads are repeated for each head that reads them.

    Raises:
        SpecError: they are not of the same shape, or one has none.
    """
    child = sharer(child)
    theirs, own = getattr(first, name, None), getattr(child, name, None)
    if not isinstance(theirs, nn.Linear) or not isinstance(own, nn.Linear):
        raise SpecError(f"share: {(child if theirs else first).name} has no projection '{name}'")
    target: Any = theirs
    groups, heads = getattr(first, "kv_heads", 0), getattr(first, "heads", 0)
    repeats = heads // groups if groups else 1
    if name in ("k", "v") and own.out_features == repeats * theirs.out_features and repeats > 1:
        target = Grouped(theirs, groups, repeats)
    elif own.weight.shape != theirs.weight.shape:
        raise SpecError(
            f"share: its projection '{name}' has shape {tuple(own.weight.shape)}, and "
            f"{first.name}'s {tuple(theirs.weight.shape)}; make heads x width the same"
        )
    delattr(child, name)
    child.__dict__[name] = target


def sharer(child: Layer) -> Layer:
    """The layer that has the projections: a `reset` passes them on to its child."""
    while isinstance(child, Reset):
        (child,) = child.children_layers()
    return child


def spread(qkv: QKV, child: Layer) -> QKV:
    """The first child's projections, as a child of more heads reads them."""
    own: Any = sharer(child)
    q, k, v = qkv
    k, v = (
        part.spread(t) if isinstance(part, Grouped) else t for part, t in ((own.k, k), (own.v, v))
    )
    return q, k, v
