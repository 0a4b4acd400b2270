"""Fast weights; see chunk.py for `update: chunk`."""

from __future__ import annotations

from typing import Any

from .chunk import run_chunk, supports_chunk


def supports(*args: Any, **kwargs: Any) -> str | None:
    if kwargs["rule"].update != "chunk":
        return "it has update 'chunk' alone"
    return supports_chunk(*args, **kwargs)


def run(*args: Any, **kwargs: Any) -> Any:
    return run_chunk(*args, **kwargs)
