"""Key biases of a converted model that take the mean from the keys of its memories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerzoo.memory import Memory
from layerzoo.model.compose.sharing import spread
from layerzoo.ops import accumulator_dtype
from layerzoo.spec import SpecError

from .modes import mode


@torch.no_grad()
def centre(model: Any, tokens: Tensor) -> None:
    """Set the `key_bias` of each memory to -mean(k), per head, over the tokens `[B, T]`.

    Keys of a pretrained attention lean one way: softmax does not see what all of them have in
    common, but a memory does, and confuses them. The keys are those of the source.

    Raises:
        SpecError: no memory has a key bias.
    """
    hooks = [
        window.register_forward_pre_hook(looks(memories)) for window, memories in biased(model)
    ]
    try:
        with mode(model, "full"):
            model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()


def biased(model: Any) -> list[tuple[Any, list[Any]]]:
    """The memories with a key bias of each converted block, and the window beside them.

    Raises:
        SpecError: there are none.
    """
    found = []
    for mixer in model.mixers():
        memories = [m for m in mixer.layers[1:].modules() if isinstance(m, Memory)]
        if memories := [m for m in memories if m.config.key_bias]:
            found.append((mixer.layers[0], memories))
    if not found:
        raise SpecError("no memory has a key bias; set key_bias to true in its spec")
    return found


def looks(memories: list[Any]) -> Any:
    def hook(window: Any, args: tuple[Any, ...]) -> None:
        for memory in memories:
            k = spread(window.qkv(args[0]), memory)[1].unflatten(-1, (memory.heads, -1))
            memory.key_bias.copy_(-k.mean((0, 1), dtype=accumulator_dtype(k)))

    return hook
