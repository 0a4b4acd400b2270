"""The delta rule: the op and its layers."""

from .rule import KDA, Delta, GatedDelta, delta_rule

__all__ = ["KDA", "Delta", "GatedDelta", "delta_rule"]
