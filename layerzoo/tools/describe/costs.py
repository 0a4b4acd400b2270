"""What a model's parts hold and cost at a length, and the same model with full attention.

FLOPs are those of matrix products, 2 a multiply-add, forward. Bytes are of a state with batch 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from layerzoo.layer import Layer, StateBytes
from layerzoo.model.compose import Composition
from layerzoo.model.config import ModelConfig
from layerzoo.model.language_model import LanguageModel, linear_flops
from layerzoo.registry import check_spec, get_layer

FULL = "softmax"
"""The layer that reads everything there was: what the others are held against."""


class PartCost(NamedTuple):
    """Figures of a part of a model: rule is of layers alone, without their projections."""

    parameters: int = 0
    flops: float = 0.0
    rule: float = 0.0
    memory: int = 0
    buffers: int = 0

    def __add__(self, other: Any) -> PartCost:
        return PartCost(*(a + b for a, b in zip(self, other, strict=True)))


class CostAtLength(NamedTuple):
    """Figures of a model's layers at T tokens. memory, buffers: bytes of the state, convolutions
    among the buffers. mean_rule, mean: FLOPs per token over all T, without and with projections.
    last_rule, last: of token T alone, as in decoding at the end."""

    T: int
    memory: int
    buffers: int
    mean_rule: float
    mean: float
    last_rule: float
    last: float

    @property
    def state(self) -> int:
        return self.memory + self.buffers


def on_meta(config: ModelConfig) -> LanguageModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return LanguageModel(config)


def full_attention(config: ModelConfig) -> ModelConfig:
    """The config with full attention in every block, with as many heads, key/value heads and
    channels as the block's first attention has, or else its first memory."""
    layers = tuple(attending(spec) for _, spec in config.blocks())
    return dataclasses.replace(config, layers=layers, pattern=None, overrides=None)


def attending(spec: Any) -> dict[str, Any]:
    found = list(leaves(spec))
    attention = [config for cls, config in found if cls.kind == "attention"]
    if attention:
        names = {field.name for field in get_layer(FULL).Config.fields()}
        fields = {k: v for k, v in attention[0].to_fields().items() if k in names}
        if (fields["key_dim"] or 0) % 2:  # of heads that turn other channels than their own
            fields |= {"rotary": None, "rotary_scaling": None}
        return {"name": FULL, **fields}
    for _, config in found:
        if hasattr(config, "heads"):
            widths = {name: getattr(config, name, None) for name in ("key_dim", "value_dim")}
            # Memories may have odd heads, which rotary ones may not.
            return {"name": FULL, "heads": config.heads, **widths, "rotary": None}
    return {"name": FULL}


def leaves(spec: Any) -> Iterator[tuple[type[Layer], Any]]:
    """Class and config of a spec's layer, or of all layers that it is made of."""
    cls, config = check_spec(spec)
    children = getattr(config, "children", ())
    for child in children:
        yield from leaves(child)
    if not children:
        yield cls, config


def title(spec: Any) -> str:
    """parallel(sliding, linear)"""
    cls, config = check_spec(spec)
    children = ", ".join(title(child) for child in getattr(config, "children", ()))
    return f"{cls.name}({children})" if children else cls.name


def parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def state_bytes(layer: Layer, T: int, itemsize: int = 4) -> StateBytes:
    """As the layer's own, with the caches of attention in numbers of `itemsize` bytes. Memories
    accumulate in float32 whatever their input is."""
    size = layer.state_bytes(T)
    if layer.kind == "attention":
        return StateBytes(size.memory * itemsize // 4, size.buffers)
    if isinstance(layer, Composition):
        children = layer.children_layers()
        if size == sum_bytes(child.state_bytes(T) for child in children):
            return sum_bytes(state_bytes(child, T, itemsize) for child in children)
    return size


def sum_bytes(sizes: Iterator[StateBytes]) -> StateBytes:
    memory, buffers = zip(*sizes, strict=True)
    return StateBytes(sum(memory), sum(buffers))


def conv_bytes(config: ModelConfig, itemsize: int = 4) -> int:
    """Of the state of one block's convolution."""
    return itemsize * config.dim * max(0, config.conv - 1)


def layer_parts(model: LanguageModel, T: int, itemsize: int = 4) -> list[PartCost]:
    """Every block's layer, with FLOPs per token as the mean over T. The T tokens pay for the
    persistent ones in front of them."""
    read = T + model.config.persistent
    return [
        PartCost(
            parameters(block.layer),
            block.layer.flops_per_token(read) * read / T,
            block.layer.rule_flops(read) * read / T,
            *state_bytes(block.layer, read, itemsize),
        )
        for block in model.each_block()
    ]


def other_parts(model: LanguageModel, T: int, itemsize: int = 4) -> dict[str, PartCost]:
    """What is not a layer. With the layers' parts they sum to the whole model's figures."""
    c, blocks = model.config, list(model.each_block())
    share = (T + c.persistent) / T
    norms = [model.norm, *(block.norm for block in blocks), *(block.mlp_norm for block in blocks)]
    conv = sum(parameters(block.conv) for block in blocks)
    mlp = sum(linear_flops(block.mlp) for block in blocks) * share
    found = {
        "convolutions": PartCost(conv, buffers=c.depth * conv_bytes(c, itemsize)),
        "SwiGLUs": PartCost(sum(parameters(block.mlp) for block in blocks), mlp),
        "norms": PartCost(sum(map(parameters, norms))),
        "persistent tokens": PartCost(c.persistent * c.dim),
        "embedding": PartCost(parameters(model.embedding)),
        "head, tied" if c.tie else "head": PartCost(
            0 if c.tie else parameters(model.out), linear_flops(model.out)
        ),
    }
    return {name: part for name, part in found.items() if any(part)}


def cost(model: LanguageModel, T: int, itemsize: int = 4) -> CostAtLength:
    """Figures of the model's layers at T."""
    layers = [block.layer for block in model.each_block()]

    def total(tokens: int, flops: Callable[[Layer], Callable[[int], float]]) -> float:
        read = tokens + model.config.persistent
        return read * sum(flops(layer)(read) for layer in layers) if read else 0.0

    size = sum_bytes(state_bytes(x, T + model.config.persistent, itemsize) for x in layers)
    figures = []
    for flops in (lambda layer: layer.rule_flops, lambda layer: layer.flops_per_token):
        now = total(T, flops)
        figures.append((now / T, now - total(T - 1, flops)))
    (mean_rule, last_rule), (mean, last) = figures
    conv = len(layers) * conv_bytes(model.config, itemsize)
    return CostAtLength(T, size.memory, size.buffers + conv, mean_rule, mean, last_rule, last)
