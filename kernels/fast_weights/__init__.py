"""Fast weights: networks trained while they read. `update: token` is in token.py, `update: chunk`
in chunk.py."""

from __future__ import annotations

from typing import Any

from .token import run_token, supports_token

try:
    from .chunk import run_chunk, supports_chunk  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    run_chunk = supports_chunk = None


def supports(*args: Any, **kwargs: Any) -> str | None:
    """Why the kernels cannot, or None."""
    if kwargs["rule"].update == "token":
        return supports_token(*args, **kwargs)
    if supports_chunk is None:
        return "it has no kernel for update 'chunk' yet"
    return supports_chunk(*args, **kwargs)


def run(*args: Any, **kwargs: Any) -> Any:
    """See `memories.fast_weights.engine.run`."""
    kernel: Any = run_token if kwargs["rule"].update == "token" else run_chunk
    return kernel(*args, **kwargs)
