"""Fast weights: networks trained while they read. `update: token` is in token.py, and `chunk` in
chunk.py; the rule says which."""

from __future__ import annotations

from typing import Any

from .chunk import run_chunk, supports_chunk
from .token import run_token, supports_token


def supports(*args: Any, **kwargs: Any) -> str | None:
    """Why the kernels cannot, or None."""
    chunk = kwargs["rule"].update == "chunk"
    return (supports_chunk if chunk else supports_token)(*args, **kwargs)


def run(*args: Any, **kwargs: Any) -> Any:
    """See `memories.fast_weights.engine.run`."""
    return (run_chunk if kwargs["rule"].update == "chunk" else run_token)(*args, **kwargs)
