"""Fast weights: memories that are a small network, trained while the sequence is read."""

import sys

from layerzoo.ops import callable_module

from .layer import FastWeights
from .networks import GLU, MLP, LinearNetwork
from .op import fast_weights
from .rule import Rule

__all__ = ["GLU", "MLP", "FastWeights", "LinearNetwork", "Rule", "fast_weights"]

callable_module(sys.modules[__name__])
