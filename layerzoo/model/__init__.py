"""The language model: layers tiled over depth, the compositions of layers, and their states."""

from layerzoo.model.config import ModelConfig
from layerzoo.model.language_model import LanguageModel

__all__ = ["LanguageModel", "ModelConfig"]
