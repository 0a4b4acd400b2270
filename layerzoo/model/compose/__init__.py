"""Layers made of layers, one file each; children are given as specs or as built layers."""

from .base import ChildrenConfig, Composition
from .gated import Gated
from .heads import Heads
from .parallel import Parallel
from .reset import Reset
from .sequential import Sequential

__all__ = ["ChildrenConfig", "Composition", "Gated", "Heads", "Parallel", "Reset", "Sequential"]
