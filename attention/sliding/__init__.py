"""Sliding-window attention with sinks: the op and its layer."""

from .rule import SlidingAttention, sliding_attention

__all__ = ["SlidingAttention", "sliding_attention"]
