"""What is timed: our layer, or its rule, as an arm, and the measures of an arm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerzoo.layer import Layer

from .measure import Call, difference
from .peers import Contender, Tensors

PIECE = 1024
"""Tokens of a piece of a prefill."""
STEPS = 64
"""Tokens that a timed decode makes, one a call: a memory that does more at the end of every
mini-batch would look cheaper by its first token alone."""
MEASURES = {
    "forward": "forward",
    "backward": "forward+backward",
    "prefill": "prefill",
    "decode": "decode",
}
"""As --measure names them, and as they are printed."""


def arm_of(layer: Layer, x: Tensor, mode: str) -> Contender | None:
    """Our layer, or its rule alone, on x `[B, T, D]`; None where there is no such rule."""
    if mode == "layers":

        def run(tensors: Tensors, state: Any) -> tuple[Tensor, Any]:
            return layer(tensors["x"], state)

        return Contender(run, {"x": x}, tuple(layer.parameters()), step=run, carries=True)
    with torch.no_grad():
        inner = layer.inner(x)
    return inner and Contender(inner.fn, inner.tensors, step=inner.fn, carries=True)


def call_of(arm: Contender, measure: str) -> Call | None:
    """A measure of an arm as a call without arguments, or None where the arm cannot do it."""
    if measure in arm.without:
        return None
    tensors = {name: t.detach().requires_grad_() for name, t in arm.tensors.items()}
    run, step = arm.run, arm.step

    @torch.no_grad()
    def forward() -> tuple[Tensor, Any]:
        return run(tensors, None)

    if measure == "forward":
        return forward
    if measure == "backward":
        leaves = (*tensors.values(), *arm.parameters)
        grad = torch.randn_like(forward()[0])

        def backward() -> None:
            o, _ = run(tensors, None)
            torch.autograd.grad(o, leaves, grad, allow_unused=True)

        return backward
    T = next(iter(tensors.values())).shape[1]
    pieces = [cut(tensors, n, n + PIECE) for n in range(0, T, PIECE)]

    @torch.no_grad()
    def prefill() -> Any:
        state = None
        for piece in pieces:
            _, state = run(piece, state)
        return state

    if measure == "prefill":
        return prefill if arm.carries or (step and len(pieces) == 1) else None
    if step is None:
        return None
    token = cut(tensors, T - 1, T)
    start = prefill() if arm.carries else forward()[1]

    @torch.no_grad()
    def decode() -> None:
        state = start
        for _ in range(STEPS):
            _, state = step(token, state)

    return decode


def cut(tensors: Tensors, start: int, end: int) -> Tensors:
    """The tokens from `start` up to `end`."""
    return {name: t[:, start:end] for name, t in tensors.items()}


@torch.no_grad()
def disagreement(ours: Contender, theirs: Contender) -> float:
    """Largest relative difference of the outputs, of all tokens and of one more after them."""
    want, state = ours.run(ours.tensors, None)
    got, other = theirs.run(theirs.tensors, None)
    errors = [difference(got, want)]
    if ours.step and theirs.step:  # both have a state
        want, _ = ours.step(cut(ours.tensors, -1, want.shape[1]), state)
        got, _ = theirs.step(cut(theirs.tensors, -1, got.shape[1]), other)
        errors.append(difference(got, want))
    return max(errors)
