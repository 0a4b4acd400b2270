"""The work of a mini-batch as one compiled function, on request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from layerzoo.ops import ImplError

from .rule import Rule


@functools.cache
def compiled_piece(piece: Any, rule: Rule) -> Callable[..., Any]:
    """`token_piece` or `chunk_piece` as one compiled function, of a rule alone: torch compiles a
    function a limited number of times."""
    from torch._dynamo.exc import BackendCompilerFailed  # seconds, of those who compile

    alone = FunctionType(piece.__code__.replace(), piece.__globals__, piece.__name__)
    fast = torch.compile(alone, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except BackendCompilerFailed as error:
            why = " ".join(str(error).split("\n\n")[0].split())
            raise ImplError(
                f"fast_weights: cannot be compiled here, set compiled to false: {why}"
            ) from error

    return run
