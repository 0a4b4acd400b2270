"""The checkpoints that a config asks for: this class path stands in YAML files."""

from layerzoo.train.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
