"""Memory layers: one file per rule. The ops can be imported from here."""

from typing import TYPE_CHECKING

from layerzoo.ops import callable_module

from .delta import delta_rule
from .linear import linear_attention

if TYPE_CHECKING:
    from .fast_weights import fast_weights
    from .mesa import mesa
else:  # the modules, which are called as their ops: they and the ops have one name
    from . import fast_weights, mesa

    for module in (fast_weights, mesa):
        callable_module(module)

__all__ = ["delta_rule", "fast_weights", "linear_attention", "mesa"]
