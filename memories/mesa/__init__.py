"""MesaNet's ridge memory: the op and its layer."""

import sys

from layerzoo.ops import callable_module

from .rule import Mesa, mesa

__all__ = ["Mesa", "mesa"]

callable_module(sys.modules[__name__])
