"""Converted models: the source to the bit, the law, and what transformers does with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from layerzoo import SpecError
from layerzoo.generation.decode import stream
from layerzoo.hf import LayerzooForCausalLM, convert, load
from layerzoo.hf.modes import mode, vary

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROPES: dict[str, Any] = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    },
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
MEMORIES: dict[str, Any] = {
    "allmem": {"name": "allmem", "mini_batch": 5},
    "retention": "retention",  # its decay is a buffer that no file holds
    "kda": "kda",
    "ttt_mlp": {"name": "ttt_mlp", "mini_batch": 4},
    "reset": {"name": "reset", "children": ["gated_delta"], "every": 7},
}


def source(family: str = "llama", **fields: Any) -> Any:
    torch.manual_seed(1)
    config = FAMILIES[family](**{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # they start at 1 and 0, and would not show
            torch.nn.init.normal_(parameter, 0.7, 0.2)
    return model


def tokens(B: int = 2, T: int = 40) -> Tensor:
    return torch.randint(1, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))


def converted(family: str = "qwen3", memory: Any = "allmem", **fields: Any) -> Any:
    """One whose memory has a say."""
    model = source(family)
    options = {"window": 8, "sinks": 2, "scale_init": 0.3, **fields}
    torch.manual_seed(0)
    spec = MEMORIES.get(memory, memory) if isinstance(memory, str) else memory
    return convert(model, spec, **options)


def hidden_mask(T: int, window: int, sinks: int) -> Tensor:
    i = torch.arange(T)
    near = (i[:, None] - i < window) | (i < sinks)
    return ((i[:, None] >= i) & near)[None, None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_the_start_it_is_the_source(family: str, attention: str) -> None:
    """To the bit while the window hides nothing; then the source with a mask."""
    model = source(family, attn_implementation=attention)
    x = tokens()
    whole = model(x).logits
    seen = hidden_mask(40, 8, 2)
    masked = model(
        x, attention_mask=seen if attention == "sdpa" else torch.where(seen, 0.0, -torch.inf)
    ).logits
    wide = convert(model, MEMORIES["allmem"], window=38, sinks=2)
    assert torch.equal(wide(x).logits, whole)
    with vary(wide, window=8):
        narrow = wide(x).logits
        assert torch.allclose(narrow, masked, rtol=0, atol=1e-5)
        assert not torch.allclose(narrow, whole, atol=1e-3)
        with mode(wide, "full"):
            assert torch.equal(wide(x).logits, whole)
        with mode(wide, "window"):
            assert torch.equal(wide(x).logits, narrow)
    assert torch.equal(wide(x).logits, whole)


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_scaled_positions_are_the_sources(rope: str) -> None:
    model = source(rope_parameters=ROPES[rope])
    whole = model(tokens()).logits
    assert torch.equal(convert(model, "gated_delta", window=64)(tokens()).logits, whole)


@pytest.mark.parametrize("layers", [[0], [-1]])
@torch.no_grad()
def test_some_blocks_keep_full_attention(layers: list[int]) -> None:
    model = converted(layers=layers)
    assert len(model.mixers()) == 1 and model.config.blocks == [layers[0] % 2]
    _, state = model.hidden(tokens())
    full = state[1 - model.config.blocks[0]]
    assert full["k"].shape[1] == 40


@pytest.mark.parametrize("write", ["all", "evicted"])
@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_pieces_equal_the_whole(memory: str, write: Any) -> None:
    if (memory, write) == ("reset", "evicted"):
        with pytest.raises(SpecError, match="write 'evicted' is for memories"):
            converted(memory=memory, write=write)
        return
    model = converted(memory=memory, write=write).double()
    x = tokens()
    whole, last = model.hidden(x)
    for cuts in ([9, 31], [3, 4, 33], [1] * 40):
        state, parts = None, []
        for piece in x.split(cuts, 1):
            h, state = model.hidden(piece, state)
            parts.append(h)
        assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
        for got, want in zip(
            *(torch.utils._pytree.tree_leaves(s) for s in (state, last)), strict=True
        ):
            assert torch.allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_files(memory: str, tmp_path: Path) -> None:
    model = converted(memory=memory)
    want = model(tokens()).logits
    model.save_pretrained(tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)):
        assert isinstance(again, LayerzooForCausalLM)
        assert torch.equal(again(tokens()).logits, want)
    assert again.config.memory == model.config.memory


@torch.no_grad()
def test_generate() -> None:
    """Greedily, as without a cache; prompts of unequal length as each alone; beams."""
    model = converted()
    x, how = tokens(T=20), {"max_new_tokens": 12, "do_sample": False}
    want = x
    for _ in range(12):
        want = torch.cat((want, model(want).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(x, **how), want)
    row = x[0].tolist()
    assert [*stream(model, row, 12)] == want[0, 20:].tolist()
    left = torch.cat((x.new_zeros(1, 7), x[:1, :13]), 1)
    both, mask = torch.cat((left, x[1:])), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    padded = model.generate(both, attention_mask=mask, **how)
    assert torch.equal(padded[0, 7:], model.generate(x[:1, :13], **how)[0])
    assert torch.equal(padded[1], want[1])
    beams = {**how, "num_beams": 3}
    assert torch.equal(model.generate(x, **beams), model.generate(x, use_cache=False, **beams))


@torch.no_grad()
def test_forward_as_transformers_calls_it() -> None:
    model = converted()
    x = tokens()
    out = model(x, labels=x)
    nll = torch.nn.functional.cross_entropy(out.logits[:, :-1].mT, x[:, 1:])
    assert torch.allclose(out.loss, nll)
    torch.testing.assert_close(model(x, logits_to_keep=3).logits, out.logits[:, -3:])
    assert model(x, use_cache=False).cache is None
    right = torch.ones_like(x)
    right[0, 30:] = 0
    padded = model(x, attention_mask=right)
    assert torch.allclose(padded.logits[0, :30], out.logits[0, :30], atol=1e-5)
    assert torch.allclose(padded.logits[1], out.logits[1], atol=1e-5)
    more = model(x[:, :1], cache=padded.cache).logits
    joined = torch.cat((x[:1, :30], x[:1, :1]), 1)
    assert torch.allclose(more[0, 0], model(joined).logits[0, -1], atol=1e-5)


@torch.no_grad()
def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    want = model(tokens()).logits
    monkeypatch.setattr("layerzoo.hf.model.PIECE", 13)
    assert torch.allclose(model(tokens()).logits, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_does_not_grow() -> None:
    model = converted()
    cache, sizes = None, []
    for n in range(60):
        cache = model(tokens(1, 60)[:, n : n + 1], cache=cache).cache
        sizes.append(cache.nbytes)
    assert len(set(sizes[12:])) == 1
    assert sizes == [model.state_bytes(n).total for n in range(1, 61)]
    with mode(model, "full"):
        assert model.state_bytes(60).total > model.state_bytes(30).total


def test_what_is_added() -> None:
    model = converted()
    added, theirs = model.added_parameters()
    assert theirs == sum(p.numel() for p in source("qwen3").parameters())
    names = dict(model.named_parameters())
    for name, parameter in model.memory_parameters():
        assert names[name] is parameter
    (mixer, _) = model.mixers()
    window, memory = mixer.layers
    assert memory.q is window.q and memory.k.theirs is window.k
    assert added == 2 * sum(p.numel() for p in [mixer.scales, *memory.parameters()])


@pytest.mark.parametrize(
    ("config", "memory"),
    [
        # Qwen3-0.6B with the network as wide as twice a head; SmolLM2-135M, three times
        (
            Qwen3Config(
                vocab_size=151936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=True,
            ),
            {"name": "allmem", "network": {"name": "glu", "expansion": 2, "residual": True}},
        ),
        (
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            ),
            {"name": "allmem", "network": {"name": "glu", "expansion": 3, "residual": True}},
        ),
    ],
    ids=["qwen3-0.6b", "smollm2-135m"],
)
def test_the_recipe_adds_six_to_ten_percent(config: Any, memory: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    added, theirs = convert(model, memory).added_parameters()
    assert 0.06 <= added / theirs <= 0.10


def test_the_memory_starts_as_it_starts_alone() -> None:
    """transformers initialises what it does not know: Linear layers, with zeros for biases."""
    memory = converted(memory={"name": "titans", "mini_batch": 4}).mixers()[0].layers[1]
    assert (memory.decay_gate.x.bias == -9).all()
    assert (memory.decay_gate.x.weight.abs() < 48**-0.5).all()
    assert memory.decay_gate.x.weight.std() > 0.4 * 48**-0.5  # uniform, as torch has it


@torch.no_grad()
def test_variations_are_undone() -> None:
    model = converted(write="evicted")
    want = model(tokens()).logits
    with vary(model, window=5, sinks=1, mini_batch=3):
        other = model(tokens()).logits
    fresh = converted(write="evicted", window=5, sinks=1)
    with vary(fresh, mini_batch=3):
        assert torch.equal(fresh(tokens()).logits, other)
    assert torch.equal(model(tokens()).logits, want) and not torch.equal(other, want)
    with (
        pytest.raises(SpecError, match="no mini-batch"),
        vary(converted(memory="kda"), mini_batch=3),
    ):
        pass
    with (
        pytest.raises(SpecError, match="unknown mode 'fulll'; did you mean 'full'"),
        mode(model, "fulll"),
    ):
        pass


def test_checkpointing_changes_no_gradient() -> None:
    model = converted()
    loss = []
    for on in (False, True):
        model.zero_grad()
        model.checkpoint = on
        h, _ = model.hidden(tokens())
        h.square().mean().backward()
        loss.append([p.grad.clone() for _, p in model.memory_parameters()])
    for a, b in zip(*loss, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7) and a.abs().max() > 0


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {},
        "'dynamic' change with",
    ),
    ({}, {"memory": "softmax"}, "memory: softmax is no memory"),
    ({}, {"memory": "allmen"}, "did you mean 'allmem'"),
    ({}, {"memory": {"name": "allmem", "heads": 3}}, "allmem: heads: the source has 4"),
    ({}, {"memory": "allmem", "layers": [2]}, "layers: 2 is not among the 2 blocks"),
    ({}, {"memory": "allmem", "window": 0}, "window: must be at least 1"),
]


@pytest.mark.parametrize(("fields", "options", "message"), BAD)
def test_what_cannot_be_converted(fields: Any, options: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        convert(source(**fields), **options)


def test_other_models_and_caches_are_refused(tmp_path: Path) -> None:
    model = converted()
    with pytest.raises(SpecError, match="is a converted model"):
        convert(model)
    windows = source("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(SpecError, match="have a window already"):
        convert(windows)
    used = DynamicCache()
    used.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    with pytest.raises(SpecError, match="a DynamicCache that has read tokens"):
        model(tokens(), cache=used)
    holes = torch.ones(2, 40, dtype=torch.long)
    holes[0, 20] = 0
    with pytest.raises(SpecError, match="one run of tokens"):
        model(tokens(), attention_mask=holes)
    with pytest.raises(SpecError, match="reads tokens"):
        model(tokens(), inputs_embeds=torch.zeros(1))
    with pytest.raises(SpecError, match=r"no config\.json"):
        load(tmp_path)
