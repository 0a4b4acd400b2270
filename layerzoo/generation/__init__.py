"""Continuing a sequence token by token, and the states that hold what has been read."""

from layerzoo.generation.decode import generate, stream
from layerzoo.generation.states import load_state, save_state

__all__ = ["generate", "load_state", "save_state", "stream"]
