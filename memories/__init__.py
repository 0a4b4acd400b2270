"""Memory layers: one folder per rule. The ops can be imported from here.

Two of them, `mesa` and `fast_weights`, have the names of their modules, which are called in their
place and imported on demand.
"""

import importlib
from typing import TYPE_CHECKING

from .delta import delta_rule
from .linear import linear_attention

if TYPE_CHECKING:
    from .fast_weights import fast_weights
    from .mesa import mesa
else:

    def __getattr__(name):
        if name in ("fast_weights", "mesa"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


__all__ = ["delta_rule", "fast_weights", "linear_attention", "mesa"]
