"""LanguageModel: layer specs tiled over depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo.generation import generate
from layerzoo.layer import Reach, State, StateBytes, check_state
from layerzoo.model.config import ModelConfig
from layerzoo.nn import RMSNorm, ShortConv, SwiGLU
from layerzoo.ops import Op, transforming
from layerzoo.registry import build
from layerzoo.signature import Bound, Match
from layerzoo.spec import SpecError, error_at

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
        # Not `self.layer(..)`, which would check again what the model has checked.
        h, new["layer"] = nn.Module.__call__(self.layer, h, state["layer"])
        x = x + h
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, new

    def init_state(self, batch_size: int) -> State:
        conv = {"conv": self.conv.init_state(batch_size)} if self.conv is not None else {}
        return {**conv, "layer": self.layer.init_state(batch_size)}


class Stack:
    """What holds for any model whose `each_block` yields blocks with a `layer`."""

    def each_block(self) -> Iterable[Any]:
        raise NotImplementedError

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


class LanguageModel(Stack, nn.Module):
    """Embedding, blocks, final norm, head. It obeys the law of a layer: `model(tokens, state)`
    in any pieces equals the whole.

    Args:
        config: a `ModelConfig`, or else
        fields: its fields, as in ``LanguageModel(vocab_size=256, layers=["linear"])``.
        impl: how every layer runs (auto, recurrent, chunked, triton); not part of the function.
        checkpoint, compiled: of every layer, see `Layer`; neither are these.
    """

    Config = ModelConfig
    generate = generate

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
        self.ids = Bound(0, c.vocab_size - 1, "give ids of the vocabulary")
        std = c.dim**-0.5 if c.tie else 1.0
        nn.init.normal_(self.embedding.weight, std=std)
        self.persistent = None
        if c.persistent:
            self.persistent = nn.Parameter(torch.randn(c.persistent, c.dim) * std)
        self.blocks = nn.ModuleList()
        for place, spec in c.blocks():
            with error_at(place):
                self.blocks.append(Block(c, spec))
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
            SpecError: tokens that are not integers [B, T] of the vocabulary (on a CPU: elsewhere
                it would wait for the device), a state of another model or batch size, or
                documents beside a state. Only the first and last while torch.compile traces.
        """
        check_tokens(tokens, state, documents)
        if not is_compiling():
            self._check(tokens, state)
        if documents is not None:
            rows, where = unpack(tokens, documents)
            return self.hidden(rows)[0][where], None
        state = self.init_state(len(tokens)) if state is None else state
        x, state = self._run(self.embedding(tokens), state)
        return self.norm(x), state

    def _check(self, tokens: Tensor, state: State) -> None:
        """Refuse ids that are not of the vocabulary, and a state of another model or batch."""
        if tokens.is_cpu and tokens.numel() and type(tokens) is Tensor and not transforming():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                Match("model").within(self.ids, tokens, "tokens")  # which says what is wrong
        if state is not None:
            found = Match("model", B=len(tokens))
            check_state(self, found, state, lambda: self.start(0))

    def _run(self, x: Tensor, states: State) -> tuple[Tensor, State]:
        """x `[B, T, D]` through the blocks."""
        new = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state)
            new.append(state)
        return x, new

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

    def start(self, batch_size: int) -> State:
        """The state before any token, persistent ones as well."""
        return [block.init_state(batch_size) for block in self.each_block()]

    def init_state(self, batch_size: int) -> State:
        """The state before the first token, after the persistent ones: of them it has gradients.
        Positions, windows and mini-batches count them."""
        state = self.start(batch_size)
        if self.persistent is None:
            return state
        # A copy: a view of a parameter wants gradients even where none are recorded.
        return self._run(self.persistent.repeat(batch_size, 1, 1), state)[1]

    def state_bytes(self, T: int) -> StateBytes:
        """Bytes of the state after T tokens, batch 1, float32; convolutions count as buffers, and
        what is cached of persistent tokens as the rest (the parameters themselves do not)."""
        read = T + self.config.persistent
        sizes = [block.layer.state_bytes(read) for block in self.each_block()]
        conv = 4 * self.config.dim * max(0, self.config.conv - 1) * self.config.depth
        return StateBytes(sum(s.memory for s in sizes), sum(s.buffers for s in sizes) + conv)

    def flops_per_token(self, T: int) -> float:
        """Matrix-product FLOPs per token, forward, mean over T: layers, SwiGLUs and head. The T
        tokens pay for the persistent ones, which every sequence reads once (without the head)."""
        read = T + self.config.persistent
        blocks = sum(
            linear_flops(block.mlp) + block.layer.flops_per_token(read)
            for block in self.each_block()
        )
        return linear_flops(self.out) + blocks * (read / T if T else 1)

    def reach(self) -> Reach | None:
        """How far back a token can be and still have an effect; None is unbounded. Persistent
        tokens are no tokens, but where they are a layer's sinks, its first tokens are not."""
        reaches = [block.layer.reach() for block in self.each_block()]
        if any(reach is None for reach in reaches):
            return None
        back, sinks = zip(*filter(None, reaches), strict=True)
        conv = self.config.depth * max(0, self.config.conv - 1)
        return Reach(sum(back) + conv, max(0, max(sinks) - self.config.persistent))

    def cautions(self, T: int) -> list[str]:
        return super().cautions(T + self.config.persistent)


def linear_flops(part: nn.Module | None) -> float:
    """FLOPs per token of the linear maps in a part of a model, 2 a multiply-add."""
    linear = (m for m in part.modules() if isinstance(m, nn.Linear)) if part else ()
    return sum(2.0 * m.in_features * m.out_features for m in linear)


def check_tokens(tokens: Tensor, state: State, documents: Tensor | None) -> None:
    """Refuse what no model can read.

    Raises:
        SpecError: tokens that are not integers [B, T], or documents beside a state.
    """
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        got = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise SpecError(f"tokens: expected integers [B, T], got {got}; give int64 or int32")
    if documents is None:
        return
    if state is not None:
        raise SpecError("documents: cannot continue a state; give one or the other")
    if documents.shape != tokens.shape:
        raise SpecError(f"documents: shape {tuple(documents.shape)} is not the tokens'")


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
