"""What a language model computes."""

from __future__ import annotations

from typing import Any, final

from layerzoo.model.pattern import (
    DEEPEST,
    block_indices,
    check_blocks,
    completed,
    overridden,
    tiled,
)
from layerzoo.spec import Config, SpecError


@final  # jsonargparse: its fields stand directly below `network` in YAML
class ModelConfig(Config):
    """What a language model computes."""

    vocab_size: int
    """The vocabulary has this many tokens."""
    layers: dict[str, Any] | tuple[Any, ...]
    """The specs of the layers are tiled over the depth: block n runs layers[n % len(layers)]. Or
    they are given by name, for pattern."""
    pattern: str | None = None
    """The names of the layers in their order, tiled over the depth, as in 'window*3 full'."""
    overrides: dict[Any, Any] | None = None
    """Exceptions map the index of a block (negative from the end) to fields that are merged over
    its spec, one level deep, or to a whole spec: {0: {window: 16}, -1: {name: softmax}}."""
    dim: int = 128
    """The model has width D."""
    depth: int = 2
    """The model has this many blocks."""
    conv: int = 4
    """The causal convolution in front of every layer has this width; 0 leaves it out."""
    mlp: float = 0.0
    """The SwiGLU after every layer has this hidden width, as a multiple of dim; 0 leaves it
    out."""
    tie: bool = False
    """If true, the output head shares the embedding's weight, and then the embedding starts
    small."""
    persistent: int = 0
    """So many learned tokens stand in front of every sequence and document. Their outputs are
    dropped."""

    def check(self) -> None:
        for name in ("vocab_size", "dim", "depth"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("conv", "mlp", "persistent"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.depth > DEEPEST:
            raise SpecError(f"depth: must be in [1, {DEEPEST}], got {self.depth}")
        if self.overrides is not None:
            object.__setattr__(self, "overrides", block_indices(self.overrides))
        check_blocks(self.layers, self.pattern, self.depth, self.overrides or {})

    def to_fields(self) -> dict[str, Any]:
        """All fields, and those of every layer, which `from_fields` reads."""
        fields = {**super().to_fields(), "layers": completed(self.layers)}
        if self.overrides is not None:
            fields["overrides"] = completed(self.overrides)
        return fields

    def blocks(self) -> list[tuple[str, Any]]:
        """The spec of every block, behind the place where it was given."""
        return overridden(tiled(self.layers, self.pattern, self.depth), self.overrides or {})
