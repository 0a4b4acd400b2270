"""The callbacks that a config names: these class paths stand in YAML files."""

from layerzoo.train.callbacks import Controls, Diagnostics

__all__ = ["Controls", "Diagnostics"]
