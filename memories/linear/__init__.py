"""Linear attention: the op, its layer and the presets."""

from .rule import LinearAttention, linear_attention

__all__ = ["LinearAttention", "linear_attention"]
