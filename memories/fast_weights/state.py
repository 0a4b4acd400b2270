"""The state of fast weights: enough to continue at any token, and nothing that a rule lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import Rule

WeightsState = dict[str, Any]
"""weights W_0: of every matrix at the start of the current mini-batch, `[B, H, I, O]`.
updates U: what the mini-batch has added so far, likewise. momentum S: likewise.
retention A: product of 1 - decay over the mini-batch so far, `[B, H]`.
momentum_sum m: sum of the momentum gates over it, `[B, H]` (of `update: chunk`).
position: tokens read so far, a 0-d integer on the CPU."""


def init_state(rule: Rule, weights: tuple[Tensor, ...], batch_size: int) -> WeightsState:
    """The state before the first token. weights: initial ones, `[H, I, O]` or `[B, H, I, O]`."""
    shapes = [(batch_size, *w.shape[-3:]) for w in weights]
    # Clones: a state must not change when an optimiser steps on the parameters.
    state: WeightsState = {
        "weights": tuple(w.expand(s).clone() for w, s in zip(weights, shapes, strict=True))
    }
    rows = weights[0].new_zeros(shapes[0][:2])
    if rule.has_momentum:
        state["momentum"] = tuple(torch.zeros_like(w) for w in state["weights"])
    if rule.mini_batch > 1 or rule.spares_initial:
        state["position"] = torch.zeros((), dtype=torch.int64, device="cpu")
    if rule.mini_batch == 1:
        return state
    state["updates"] = tuple(torch.zeros_like(w) for w in state["weights"])
    if rule.has_decay:
        state["retention"] = rows + 1
    if rule.has_momentum and rule.update == "chunk":
        state["momentum_sum"] = rows
    return state


def position(state: WeightsState) -> int:
    return int(state["position"]) if "position" in state else 0


PENDING = ("retention", "momentum_sum")


def to_rows(x: Any) -> Any:
    """A part of a state, `[B, H, ..]`, as the engine works on it, `[B H, ..]`."""
    return tuple(w.flatten(0, 1) for w in x) if isinstance(x, tuple) else x.flatten(0, 1)


def from_rows(now: Any, like: WeightsState, past: int, rows: tuple[int, int]) -> WeightsState:
    """The state after `past` tokens, with the parts that `like` has, from the engine's `Running`;
    rows: (B, H)."""

    def back(weights: Any, like: Any) -> Any:
        if weights is None:
            return tuple(torch.zeros_like(w) for w in like)
        return tuple(w.unflatten(0, rows) for w in weights)

    def gate(x: Tensor | None, empty: float) -> Tensor:
        return like["weights"][0].new_full(rows, empty) if x is None else x.reshape(rows)

    like_W = like["weights"]
    new: WeightsState = {
        "weights": lambda: back(now.W, like_W),
        "updates": lambda: back(now.U, like_W),
        "momentum": lambda: back(now.S, like_W),
        "retention": lambda: gate(now.A, 1.0),
        "momentum_sum": lambda: gate(now.m, 0.0),
        "position": lambda: torch.full_like(like["position"], past),
    }
    return {name: new[name]() for name in like}
