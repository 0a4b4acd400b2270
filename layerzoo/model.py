"""LanguageModel: layer specs tiled over depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from layerzoo import generate
from layerzoo.layer import Layer, Reach, State, StateBytes, build, check_spec
from layerzoo.nn import RMSNorm, ShortConv, SwiGLU
from layerzoo.ops import Op
from layerzoo.spec import Config, SpecError, at

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@final  # jsonargparse: its fields stand directly below `network` in YAML
class ModelConfig(Config):
    """What a language model computes.

    vocab_size: number of token ids. dim: width D. depth: number of blocks.
    layers: specs, tiled over the depth: block n runs layers[n % len(layers)].
    conv: width of the causal convolution in front of every layer, 0 is off.
    mlp: hidden width of the SwiGLU after every layer as a multiple of dim, 0 is off.
    tie: the output head shares the embedding's weight (then the embedding starts small).
    """

    vocab_size: int
    layers: tuple[Any, ...]
    dim: int = 128
    depth: int = 2
    conv: int = 4
    mlp: float = 0.0
    tie: bool = False

    def check(self) -> None:
        for name in ("vocab_size", "dim", "depth"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("conv", "mlp"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not 1 <= len(self.layers) <= self.depth:
            raise SpecError(
                f"layers: needs 1 to depth={self.depth} specs to tile, got {len(self.layers)}"
            )
        for n, spec in enumerate(self.layers):
            with at(f"layers[{n}]"):
                check_spec(spec)
                if isinstance(spec, Layer) and n + len(self.layers) < self.depth:
                    raise SpecError("a built layer cannot be tiled; give its spec, layer.spec()")


class Block(nn.Module):
    """x + layer(conv(norm(x))), then x + SwiGLU(norm(x)) where there is one."""

    def __init__(self, config: ModelConfig, spec: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, eps=1e-6)
        self.conv = ShortConv(config.dim, config.conv) if config.conv else None
        self.layer = build(spec, dim=config.dim)
        hidden = round(config.mlp * config.dim)
        self.mlp_norm = RMSNorm(config.dim, eps=1e-6) if hidden else None
        self.mlp = SwiGLU(config.dim, hidden) if hidden else None

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, new = self.norm(x), {}
        if self.conv is not None:
            h, new["conv"] = self.conv(h, state["conv"])
        h, new["layer"] = self.layer(h, state["layer"])
        x = x + h
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, new

    def init_state(self, batch_size: int) -> State:
        conv = {"conv": self.conv.init_state(batch_size)} if self.conv is not None else {}
        return {**conv, "layer": self.layer.init_state(batch_size)}


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm, head. It obeys the law of a layer: `model(tokens, state)`
    in any pieces equals the whole.

    Args:
        config: a `ModelConfig`, or else
        fields: its fields, as in ``LanguageModel(vocab_size=256, layers=["linear"])``.
        impl: how every layer runs (auto, recurrent, chunked, triton); not part of the function.
        checkpoint, compiled: of every layer, see `Layer`; neither are these.
    """

    Config = ModelConfig
    generate = generate.generate

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        impl: str = "auto",
        checkpoint: bool = False,
        compiled: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = c = config or ModelConfig.from_fields(fields)
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        nn.init.normal_(self.embedding.weight, std=c.dim**-0.5 if c.tie else 1.0)
        self.blocks = nn.ModuleList()
        for n in range(c.depth):
            with at(f"layers[{n % len(c.layers)}]"):
                self.blocks.append(Block(c, c.layers[n % len(c.layers)]))
        self.norm = RMSNorm(c.dim, eps=1e-6)
        self.out = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tie:
            self.out.weight = self.embedding.weight
        for block in self.each_block():
            layer = block.layer
            layer.impl, layer.checkpoint, layer.compiled = impl, checkpoint, compiled

    def each_block(self) -> Iterable[Block]:
        return (block for block in self.blocks if isinstance(block, Block))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        state: State = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """The last hidden states, before the head, and the state.

        Args:
            documents: id of the document that each token belongs to; a run of equal ids is one
                document, and no document sees another. The returned state is then None.

        Raises:
            SpecError: tokens that are not integers [B, T], or documents beside a state.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise SpecError(f"tokens: expected integers [B, T], got {tuple(tokens.shape)}")
        if documents is not None:
            if state is not None:
                raise SpecError("documents: cannot continue a state; give one or the other")
            if documents.shape != tokens.shape:
                raise SpecError(f"documents: shape {tuple(documents.shape)} is not the tokens'")
            rows, where = unpack(tokens, documents)
            return self.hidden(rows)[0][where], None
        x = self.embedding(tokens)
        states = self.init_state(len(tokens)) if state is None else state
        new = []
        for block, block_state in zip(self.blocks, states, strict=True):
            x, block_state = block(x, block_state)
            new.append(block_state)
        return self.norm(x), new

    def head(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... vocab"]:
        """Logits of hidden states; give it only the positions that need them."""
        return self.out(h)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: State = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T vocab"], State]:
        h, state = self.hidden(tokens, state, documents)
        return self.head(h), state

    def init_state(self, batch_size: int) -> State:
        return [block.init_state(batch_size) for block in self.each_block()]

    def state_bytes(self, T: int) -> StateBytes:
        """Bytes of the state after T tokens, batch 1, float32; convolutions count as buffers."""
        sizes = [block.layer.state_bytes(T) for block in self.each_block()]
        conv = 4 * self.config.dim * max(0, self.config.conv - 1) * self.config.depth
        return StateBytes(sum(s.memory for s in sizes), sum(s.buffers for s in sizes) + conv)

    def flops_per_token(self, T: int) -> float:
        """Matrix-product FLOPs per token, forward, mean over T: layers, SwiGLUs and head."""
        outside = [self.out, *(block.mlp for block in self.each_block() if block.mlp)]
        linear = (m for part in outside for m in part.modules() if isinstance(m, nn.Linear))
        total = sum(2.0 * m.in_features * m.out_features for m in linear)
        return total + sum(block.layer.flops_per_token(T) for block in self.each_block())

    def reach(self) -> Reach | None:
        """How far back a token can be and still have an effect; None is unbounded."""
        reaches = [block.layer.reach() for block in self.each_block()]
        if any(reach is None for reach in reaches):
            return None
        back, sinks = zip(*filter(None, reaches), strict=True)
        return Reach(sum(back) + self.config.depth * max(0, self.config.conv - 1), max(sinks))

    def cautions(self, T: int) -> list[str]:
        """What its layers cannot do in sequences of T tokens, each line once."""
        return list(
            dict.fromkeys(c for block in self.each_block() for c in block.layer.cautions(T))
        )

    def choices(self) -> dict[str, list[str]]:
        """Which implementations of its ops have run in this process since `forget_choices`."""
        return {op.name: sorted(op.used) for op in self._ops()}

    def forget_choices(self) -> None:
        """Start the record of `choices` anew."""
        for op in self._ops():
            op.used.clear()

    def _ops(self) -> list[Op]:
        found = {op.name: op for block in self.each_block() for op in block.layer.ops()}
        return list(found.values())


def unpack(tokens: Tensor, documents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One row a document, padded at the right, and the index that puts rows back into place."""
    B, T = tokens.shape
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    row = first.flatten().cumsum(0).view(B, T) - 1
    steps = torch.arange(T, device=tokens.device).expand(B, T)
    column = steps - torch.where(first, steps, 0).cummax(1).values
    count, length = (int(i.max()) + 1 if i.numel() else 0 for i in (row, column))
    rows = tokens.new_zeros(count, length)
    rows[row, column] = tokens
    return rows, (row, column)
