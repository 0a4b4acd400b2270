"""What of fast weights torch.compile compiles: on request the work of a mini-batch, and never the
loop over mini-batches."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from layerzoo.ops import ImplError

from .rule import Rule


def uncompiled(fn: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The function, which torch.compile calls as it is. (`torch.compiler.disable` imports
    torch._dynamo, 2 seconds; here it waits until something else has imported that.)"""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(fn, reason=reason))
        return disabled[0](*args, **kwargs)

    return run


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
