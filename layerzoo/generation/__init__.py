"""Continuing a sequence token by token."""

from layerzoo.generation.decode import generate, stream

__all__ = ["generate", "stream"]
