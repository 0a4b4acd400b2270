"""The config of a converted model, as transformers keeps it in config.json."""

from __future__ import annotations

from typing import Any

from layerzoo.data.tokenizer import extra

transformers = extra("transformers")
transformers.utils.logging.disable_progress_bar()

KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What tools read off a config: the source's."""


class LayerzooConfig(transformers.PreTrainedConfig):
    """Of what model, and what was put in parallel with its attention; see `convert`.

    source: the source's config, in plain types.
    memory: the spec of the memory.
    window, sinks, write, scale_init: see `convert`.
    blocks: the indices of the converted blocks.
    """

    model_type = "layerzoo"

    def __init__(
        self,
        source: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        window: int = 512,
        sinks: int = 4,
        blocks: list[int] | None = None,
        write: str = "all",
        scale_init: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.source, self.memory = source or {}, memory or {}
        self.window, self.sinks, self.write = window, sinks, write
        self.blocks, self.scale_init = blocks or [], scale_init
        kept = {name: self.source[name] for name in KEPT if name in self.source}
        super().__init__(**{**kept, **kwargs})

    def source_config(self) -> Any:
        """The source's config, as its own class."""
        fields = {name: value for name, value in self.source.items() if name != "model_type"}
        return transformers.AutoConfig.for_model(self.source["model_type"], **fields)
