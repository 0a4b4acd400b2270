"""The language model that a config trains: this class path stands in YAML files."""

from layerzoo.train.lit import LitModel

__all__ = ["LitModel"]
