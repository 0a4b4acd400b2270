"""layerzoo: memory and attention layers by name, for ablations of how sequence models remember."""

from layerzoo.layer import Layer, build, get_layer, list_layers
from layerzoo.spec import SpecError

__all__ = ["Layer", "SpecError", "build", "get_layer", "list_layers"]
__version__ = "0.1.0"
