"""Linear attention: the op, its layer and the presets."""

from .rule import Linear, linear_attention

__all__ = ["Linear", "linear_attention"]
