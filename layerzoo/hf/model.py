"""The converted model: the source's own modules, with a memory in parallel with its attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerzoo.layer import Layer, State, StateBytes
from layerzoo.model.compose import Parallel
from layerzoo.model.language_model import Stack, check_tokens, linear_flops, unpack
from layerzoo.spec import SpecError

from .cache import MemoryCache
from .config import LayerzooConfig
from .pretrained import Angles, Pretrained

PIECE = 1024
"""Tokens that are read at a time where no gradient is needed."""


class ConvertedBlock(NamedTuple):
    """A decoder layer's mixer, as our own models' blocks have theirs."""

    layer: Layer

    def init_state(self, batch_size: int) -> State:
        return self.layer.init_state(batch_size)


class LayerzooForCausalLM(Stack, PreTrainedModel, GenerationMixin):
    """A decoder of transformers whose attention is `parallel`: window, sinks and a memory.

    It is two things. To transformers it is a model like any other: `from_pretrained`, `generate`,
    `forward`, with a cache of bounded size. To us it is like a `LanguageModel`: `hidden(tokens,
    state)` in any pieces equals the whole, and tasks, metrics and `layerzoo.generation` take it.

    Its decoder layers are run as x + attention(norm(x)), then x + mlp(norm(x)), which is what the
    families of `convert` do; masks and caches of transformers are not involved.

    The attribute `alone` leaves the memories out, and does not compute them; with windows of None
    beside (see `modes`) the model is its own full-attention teacher. `checkpoint` computes each
    decoder layer again in the backward pass.
    """

    config_class = LayerzooConfig
    config: Any
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True
    _no_split_modules: ClassVar[Any] = [
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    ]

    alone = False
    checkpoint = False

    def __init__(self, config: LayerzooConfig, source: Any = None) -> None:
        """source: the model to convert, whose modules are taken over; by default a new one."""
        super().__init__(config)
        if source is None:
            source = AutoModelForCausalLM.from_config(config.source_config())
        self.model, self.lm_head = source.model, source.lm_head
        self.generation_config = source.generation_config
        angles = Angles(self.model.rotary_emb)
        self.constants: dict[nn.Module, dict[str, Tensor]] = {}
        for n, layer in enumerate(self.decoder_layers()):
            layer.self_attn = self._mixer(layer.self_attn, angles, n in config.blocks)
        self.post_init()

    def _mixer(self, theirs: Any, angles: Any, converted: bool) -> Layer:
        """A decoder layer's attention, or it and a memory side by side."""
        c = self.config
        if not converted:
            return Pretrained(theirs, angles, Pretrained.Config())
        window = Pretrained(theirs, angles, Pretrained.Config(window=c.window, sinks=c.sinks))
        fields = {"children": (window, c.memory), "share": "qkvo", "write": c.write}
        # On the CPU, whatever device is the default: from_pretrained makes a model on none.
        with torch.device("cpu"):
            mixer = Parallel(window.dim, Parallel.Config(**fields, scale_init=c.scale_init))
        self._keep_constants(mixer)
        for module in mixer.modules():  # it has done so itself; transformers would do it otherwise
            module.__dict__["_is_hf_initialized"] = True
        return mixer.to(window.q.weight.dtype)

    def _keep_constants(self, mixer: Parallel) -> None:
        """Buffers that no file holds, which from_pretrained makes anew without their values."""
        for module in mixer.layers[1:].modules():
            own = dict(module.named_buffers(recurse=False))
            if own:
                self.constants[module] = {name: buffer.clone() for name, buffer in own.items()}

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As every model of transformers, and the constants of the memories put back."""
        found = super().from_pretrained(*args, **options)
        model = found[0] if isinstance(found, tuple) else found
        for module, values in model.constants.items():
            for name, value in values.items():
                module.get_buffer(name).copy_(value)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A cast of the model does not round the frequencies of its rotary positions: in bfloat16
        they would be turns off at the end of a book."""
        rotary = self.model.rotary_emb
        exact = dict(rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            cast = rotary.get_buffer(name)
            if cast.dtype != buffer.dtype:
                setattr(rotary, name, buffer.to(cast.device))
        return self

    # Like a LanguageModel

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    def decoder_layers(self) -> Iterable[Any]:
        return self.model.layers[: self.config.num_hidden_layers]

    def each_block(self) -> Iterator[ConvertedBlock]:
        return (ConvertedBlock(layer.self_attn) for layer in self.decoder_layers())

    def mixers(self) -> list[Parallel]:
        """Those of the converted blocks."""
        return [block.layer for block in self.each_block() if isinstance(block.layer, Parallel)]

    def windows(self) -> list[Any]:
        """The pretrained attention of the converted blocks."""
        return [mixer.layers[0] for mixer in self.mixers()]

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the conversion added."""
        theirs = {id(p) for window in self.windows() for p in window.parameters()}
        for name, layer in self.model.layers.named_children():
            if isinstance(layer.self_attn, Parallel):
                for own, parameter in layer.self_attn.named_parameters():
                    if id(parameter) not in theirs:
                        yield f"model.layers.{name}.self_attn.{own}", parameter

    def added_parameters(self) -> tuple[int, int]:
        """(parameters that the conversion added, those of the source)."""
        added = sum(p.numel() for _, p in self.memory_parameters())
        return added, sum(p.numel() for p in self.parameters()) - added

    def hidden(
        self,
        tokens: Tensor,
        state: State = None,
        documents: Tensor | None = None,
        trace: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """The last hidden states `[B, T, D]` and the state; see `LanguageModel.hidden`.

        trace: is given every block's output.
        """
        check_tokens(tokens, state, documents)
        if documents is not None:
            rows, where = unpack(tokens, documents)
            return self.hidden(rows)[0][where], None
        state = self.init_state(len(tokens)) if state is None else state
        x, new = self.embedding(tokens), []
        for layer, s in zip(self.decoder_layers(), state, strict=True):
            if self.checkpoint and torch.is_grad_enabled():
                x, s = checkpoint(self._block, layer, x, s, use_reentrant=False)
            else:
                x, s = self._block(layer, x, s)
            new.append(s)
            if trace is not None:
                trace.append(x)
        return self.model.norm(x), new

    def _block(self, layer: Any, x: Tensor, state: State) -> tuple[Tensor, State]:
        mixer, h = layer.self_attn, layer.input_layernorm(x)
        if self.alone and isinstance(mixer, Parallel):
            y, first = mixer.layers[0](h, state[0])
            state = [first, *state[1:]]
        else:
            y, state = mixer(h, state)
        x = x + y
        return x + layer.mlp(layer.post_attention_layernorm(x)), state

    def head(self, h: Tensor) -> Tensor:
        return self.lm_head(h)

    def init_state(self, batch_size: int) -> State:
        states = []
        for block in self.each_block():
            if self.alone and isinstance(block.layer, Parallel):
                first: Any = block.layer.layers[0]
                states.append([first.init_state(batch_size)])
            else:
                states.append(block.init_state(batch_size))
        return states

    def state_bytes(self, T: int) -> StateBytes:
        sizes = [layer.state_bytes(T) for layer in self._running()]
        return StateBytes(sum(s.memory for s in sizes), sum(s.buffers for s in sizes))

    def flops_per_token(self, T: int) -> float:
        mlps = sum(linear_flops(layer.mlp) for layer in self.decoder_layers())
        return (
            linear_flops(self.lm_head) + mlps + sum(m.flops_per_token(T) for m in self._running())
        )

    def _running(self) -> list[Any]:
        """The layers that run: without the memories where `alone`."""
        layers: list[Any] = [block.layer for block in self.each_block()]
        return [m.layers[0] if self.alone and isinstance(m, Parallel) else m for m in layers]

    # As transformers has it

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of tokens `[B, T]`, and the cache that has read them.

        Args:
            attention_mask: 0 where a row is padded, at its left or right end: such rows are read
                without their padding, in groups of equal length.
            cache: a `MemoryCache`, which is changed; an empty one of transformers is replaced.
            labels: the loss of the next tokens, as transformers defines it.
            logits_to_keep: positions that get logits: a number of last ones, or indices; 0 is all.

        Raises:
            SpecError: a mask with holes, embeddings in place of tokens, or another model's cache.
        """
        if options.get("inputs_embeds") is not None:
            raise SpecError("inputs_embeds: a converted model reads tokens; give input_ids")
        own = MemoryCache.of(cache)
        h = own.read(self._hidden, input_ids, attention_mask)
        last = isinstance(logits_to_keep, int)  # 0 is all, as in h[:, -0:]
        logits = self.head(h[:, -logits_to_keep:] if last else h[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        kept: Any = None if use_cache is False else own
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=kept)

    def _hidden(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """In pieces where no gradient is needed, which bounds the memory that it takes."""
        if torch.is_grad_enabled() or tokens.shape[1] <= PIECE:
            return self.hidden(tokens, state)
        found = []
        for piece in tokens.split(PIECE, 1):
            h, state = self.hidden(piece, state)
            found.append(h)
        return torch.cat(found, 1), state


AutoConfig.register("layerzoo", LayerzooConfig)
AutoModelForCausalLM.register(LayerzooConfig, LayerzooForCausalLM)
