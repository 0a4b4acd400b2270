"""layerzoo: memory and attention layers by name, for ablations of how sequence models remember."""

import importlib
from typing import TYPE_CHECKING

from layerzoo.layer import Layer
from layerzoo.registry import build, get_layer, list_layers
from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from layerzoo.train.lit import load_model
else:

    def __getattr__(name):
        if name == "load_model":  # it imports Lightning, which a layer does not need
            return importlib.import_module("layerzoo.train.lit").load_model
        raise AttributeError(f"module 'layerzoo' has no attribute '{name}'")


__all__ = ["Layer", "SpecError", "build", "get_layer", "list_layers", "load_model"]
__version__ = "0.1.0"
