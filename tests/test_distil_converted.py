"""Distillation of converted models: what trains, by which gradients, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerzoo.hf import convert, load
from layerzoo.hf.distil import Distil


class Trainer:
    global_step = 0


@pytest.fixture(params=["all", "evicted"])
def source(request: Any, tmp_path: Path) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    how = {"window": 4, "sinks": 1, "write": request.param, "scale_init": 0.5}
    convert(model, {"name": "ttt_linear", "mini_batch": 4, "row": False}, **how).save_pretrained(
        tmp_path
    )
    return str(tmp_path)


def step(source: str, precision: Any = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    lit = Distil(source=source, l2=1.0, **options)
    lit._trainer = Trainer()
    lit.log = lit.log_dict = lambda *args, **how: None
    tokens = torch.randint(64, (2, 25), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = lit.training_step(batch, 0)
    loss.backward()
    return {name: p.grad for name, p in lit.named_parameters() if p.grad is not None}


def test_every_parameter_of_the_memory_learns(source: str) -> None:
    grads = step(source)
    memory = {f"model.{name}" for name, _ in load(source).memory_parameters()}
    assert grads.keys() == memory
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    half = step(source, torch.bfloat16)
    assert half.keys() == memory
    for name, grad in grads.items():
        assert torch.cosine_similarity(half[name].flatten(), grad.flatten(), 0) > 0.9, name


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"piece": 24}, {"windows": [4]}])
def test_what_changes_no_gradient(source: str, options: dict[str, Any]) -> None:
    grads, again = step(source), step(source, **options)
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad)


@pytest.mark.parametrize(
    "options", [{"piece": 10}, {"windows": [7]}, {"mini_batches": [2]}, {"window_dropout": 1.0}]
)
def test_what_changes_the_gradient(source: str, options: dict[str, Any]) -> None:
    grads, again = step(source), step(source, **options)
    assert grads.keys() == again.keys()
    assert any(not torch.allclose(grad, again[name]) for name, grad in grads.items())
