"""Forgetting attention: the op and its layer."""

from .rule import ForgettingAttention, forgetting_attention

__all__ = ["ForgettingAttention", "forgetting_attention"]
