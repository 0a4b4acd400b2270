"""convert(): a memory beside every attention of a pretrained decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from layerzoo.data.tokenizer import reason
from layerzoo.memory import Memory
from layerzoo.registry import full_spec, get_layer
from layerzoo.spec import SpecError, error_at
from layerzoo.train.trained_on import digest_files

from .config import LayerzooConfig
from .model import LayerzooForCausalLM

FAMILIES = ("llama", "qwen2", "qwen3")
"""model_type of the decoders whose layers are x + attention(norm(x)), x + mlp(norm(x))."""
ROPES = ("default", "linear", "yarn", "llama3")
"""Rotary positions that are one function for all lengths."""


def convert(
    model: Any,
    memory: str | Mapping[str, Any] = "allmem",
    *,
    window: int = 512,
    sinks: int = 4,
    layers: Sequence[int] | None = None,
    write: Literal["all", "evicted"] = "all",
    scale_init: float = 0.0,
) -> LayerzooForCausalLM:
    """Put a memory beside the attention of a pretrained decoder (AllMem, arXiv 2602.13680):

    y = window(x) + scale * memory(x),

    where the window is the source's attention over the last `window` tokens and the first `sinks`,
    and the memory shares its q, k, v and output projections, before rotary positions; keys and
    values of grouped heads are repeated. `scale`, one per channel, starts at `scale_init`: at 0
    the converted model is the windowed source, and within the window the source itself, exactly.

    Args:
        model: a Llama, Qwen2 or Qwen3 for causal language modelling. Its modules are taken over:
            do not use it any more.
        memory: the spec of any memory, or of a `reset` of one; heads, key_dim and value_dim are
            the source's.
        layers: indices of the blocks to convert, negative ones from the end; the others keep full
            attention, and the cache grows. None converts all.
        write: all, or evicted; see `parallel`.

    Raises:
        SpecError: another architecture, or a spec, window or index that does not fit.
    """
    config = model.config
    check_source(config)
    count = config.num_hidden_layers
    for n in layers or ():
        if not -count <= n < count:
            raise SpecError(f"layers: {n} is not among the {count} blocks of this model")
    blocks = sorted({n % count for n in (range(count) if layers is None else layers)})
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    with error_at("memory"):
        spec = full_spec(fitted(memory, heads, head_dim))
    return LayerzooForCausalLM(
        LayerzooConfig(
            source=source_fields(config),
            memory=spec,
            window=window,
            sinks=sinks,
            blocks=blocks,
            write=write,
            scale_init=scale_init,
        ),
        source=model,
    ).eval()


def check_source(config: Any) -> None:
    """Refuse a model that the conversion would change in more than it says."""
    kind = config.model_type
    if kind == "layerzoo":
        raise SpecError("source: is a converted model; convert the one that it was made of")
    if kind not in FAMILIES:
        raise SpecError(f"source: a '{kind}' model; converted are {', '.join(FAMILIES)}")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise SpecError(
            f"source: rotary positions of type '{rope}' change with the length of a sequence; "
            f"set rope_type to one of {', '.join(ROPES)} in its config"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise SpecError(
            "source: some of its layers have a window already; set use_sliding_window to false "
            "in its config"
        )


def fitted(memory: str | Mapping[str, Any], heads: int, head_dim: int) -> dict[str, Any]:
    """The memory's spec with the source's heads, which its projections need."""
    spec: dict[str, Any] = {"name": memory} if isinstance(memory, str) else dict(memory)
    if children := spec.get("children"):
        spec["children"] = [fitted(child, heads, head_dim) for child in children]
        return spec
    if not issubclass(get_layer(spec.get("name", "")), Memory):
        raise SpecError(f"{spec.get('name')} is no memory; see `layerzoo list`")
    for name, value in (("heads", heads), ("key_dim", head_dim), ("value_dim", head_dim)):
        if spec.setdefault(name, value) != value:
            raise SpecError(f"{spec['name']}: {name}: the source has {value}; leave it out")
    return spec


def source_fields(config: Any) -> dict[str, Any]:
    """A config in plain types, without what says where it came from."""
    drop = {"_name_or_path", "transformers_version", "quantization_config", "architectures"}
    return {name: value for name, value in config.to_dict().items() if name not in drop}


def load_source(where: str, gguf: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A pretrained model of a folder or a Hugging Face id.

    Args:
        where: the folder, or the id.
        gguf: the name of the GGUF file there, if it is one; it is read with the package gguf.
        dtype: of the weights; by default as they are stored.

    Raises:
        SpecError: there is none, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    if gguf is not None and find_spec("gguf") is None:
        raise SpecError("--gguf: needs the package gguf: pip install gguf")
    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or "auto", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(f"source: {where}: {reason(error)}") from None
    if gguf is not None:  # its weights have been made plain: it is not quantised any more
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model


def source_digest(path: str | Path) -> str:
    """SHA-256 of what a model's folder holds of it: its config and its weights."""
    kinds = ("config.json", "*.safetensors", "*.bin")
    return digest_files({p.name: p for kind in kinds for p in Path(path).glob(kind)})


def load(path: str | Path, dtype: torch.dtype | None = None) -> LayerzooForCausalLM:
    """A converted model from the folder that `save_pretrained` wrote.

    Raises:
        SpecError: it cannot be read, or is something else.
    """
    try:
        kind = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))["model_type"]
    except OSError:
        raise SpecError(
            f"{path}: no config.json in it; give the folder of a converted model"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise SpecError(f"{path}: its config.json is no model's") from None
    if kind != LayerzooConfig.model_type:
        raise SpecError(f"{path}: a '{kind}' model; `layerzoo convert --source {path}` first")
    try:
        model, loading = LayerzooForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(f"{path}: {reason(error)}") from None
    if lost := sorted({*loading["missing_keys"], *loading["unexpected_keys"]}):
        raise SpecError(f"{path}: its weights are not of its config: {lost[0]}")
    return model.eval()
