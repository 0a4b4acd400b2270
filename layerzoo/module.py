"""The base of modules of your own, which a config names by their class path."""

from layerzoo.train.module import TaskModule

__all__ = ["TaskModule"]
