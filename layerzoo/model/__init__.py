"""The language model: layers tiled over depth, the compositions of layers, and their states."""

from layerzoo.model.language_model import LanguageModel, ModelConfig

__all__ = ["LanguageModel", "ModelConfig"]
