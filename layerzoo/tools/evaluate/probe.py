"""What a memory knows of the tokens that the window hides, before anything is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerzoo.hf.modes import changed
from layerzoo.metrics.wide import wide
from layerzoo.model.compose import Parallel


@torch.no_grad()
def explained(model: Any, rows: Tensor) -> list[float]:
    """Of each converted block the share of what its window misses that its memory explains.

    missed = full(x) - window(x),   missed' = a + s m,   R^2 = 1 - sum |missed - missed'|^2 /
    sum |missed - mean|^2,

    where m is the memory's output, a and s `[D]` are the best offset and scale of each channel,
    and mean is the mean of missed, all over the positions past the window; x is the block's input
    in the source. a, s and mean are fitted on the even rows of `[B, T]` tokens, and R^2 is
    computed on the odd rows. A memory that knows nothing, or always gives the same, has 0 or less.
    R^2 says what distillation can gain by `scales` alone, which start at 0.
    """
    found, x = [], model.embedding(rows)
    for layer in model.decoder_layers():
        mixer, h = layer.self_attn, layer.input_layernorm(x)
        if isinstance(mixer, Parallel):
            first: Any = mixer.layers[0]
            with changed([first], "window", None):
                y, _ = first(h)
            past = slice(first.window, None)
            missed = (y - first(h)[0])[:, past]
            found.append(variance_share(unscaled(mixer, h)[:, past], missed))
        else:
            y, _ = mixer(h)
        x = x + y
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return found


def unscaled(mixer: Parallel, h: Tensor) -> Tensor:
    """The output of the memories alone, as if all scales were 1."""
    before = mixer.scales.clone()
    try:
        mixer.scales.fill_(1.0)
        with changed([mixer], "off", (0,)):
            return mixer(h)[0]
    finally:
        mixer.scales.copy_(before)


def variance_share(m: Tensor, missed: Tensor) -> float:
    """R^2 `explained` of m and missed, `[B, T, D]`."""
    even, odd = slice(0, None, 2), slice(1, None, 2)
    m, missed = (wide(x, x.device) for x in (m, missed))
    m = m - m[even].mean((0, 1))
    missed = missed - missed[even].mean((0, 1))
    s = (m[even] * missed[even]).sum((0, 1)) / m[even].square().sum((0, 1)).clamp(min=1e-12)
    error = (missed[odd] - s * m[odd]).square().sum()
    return float(1 - error / missed[odd].square().sum())


def by_depth(found: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    """(which blocks, the mean of each arm): each third of the arm's converted blocks, and all."""
    names = ("first third", "middle third", "last third")
    split = {arm: np.array_split(of, 3) for arm, of in found.items()}
    rows = [
        (name, [float(parts[n].mean()) for parts in split.values()])
        for n, name in enumerate(names)
        if all(len(parts[n]) for parts in split.values())
    ]
    return [*rows, ("all", [float(np.mean(of)) for of in found.values()])]
