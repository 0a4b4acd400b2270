"""The way from the model to a rule's formula: how long it is, and docs/path.md, which walks it."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import layerzoo.attention
import layerzoo.memories
from layerzoo.model import LanguageModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "path.md"
FOLDERS = {
    Path(str(module.__file__)).parent: name
    for name, module in (
        ("layerzoo", layerzoo),
        ("memories", layerzoo.memories),
        ("attention", layerzoo.attention),
    )
}


class Way(NamedTuple):
    """The files that run until the formula, how often one file calls into another, and how many
    of their frames are then on the stack."""

    files: list[str]
    switches: int
    depth: int


def ours(path: str) -> str | None:
    """The path of a file of the product from its root."""
    for folder, name in FOLDERS.items():
        if Path(path).is_relative_to(folder):
            return f"{name}/{Path(path).relative_to(folder).as_posix()}"
    return None


def way(spec: dict[str, Any], formula: tuple[str, str]) -> Way:
    """Trace `LanguageModel.hidden` of one block until it calls the formula, (file, function)."""
    model = LanguageModel(vocab_size=16, dim=32, depth=1, layers=[spec], impl="recurrent")
    tokens = torch.randint(16, (2, 16))
    calls: list[str] = []
    stack: list[str] = []
    found: list[int] = []

    def trace(frame: Any, event: str, _: Any) -> None:
        file = ours(frame.f_code.co_filename) if event in ("call", "return") else None
        if file is None or found or frame.f_code.co_name.startswith("<"):
            return
        if event == "return":
            stack.pop()
            return
        stack.append(file)
        calls.append(file)
        if (file, frame.f_code.co_name) == formula:
            found.append(len(stack))

    with torch.no_grad():
        model.hidden(tokens)  # what is made once has been made
        sys.setprofile(trace)
        try:
            model.hidden(tokens)
        finally:
            sys.setprofile(None)
    (depth,) = found
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    return Way(list(dict.fromkeys(calls)), switches, depth)


@pytest.mark.parametrize(
    ("name", "formula", "files", "switches"),
    [
        ("gated_delta", ("memories/delta/rule.py", "recurrent"), 6, 13),
        ("kda", ("memories/delta/rule.py", "recurrent"), 6, 13),
        ("titans", ("memories/fast_weights/recurrent.py", "run"), 9, 21),
        ("ttt_mlp", ("memories/fast_weights/recurrent.py", "run"), 9, 21),
    ],
)
def test_the_way_to_a_formula_is_short(
    name: str, formula: tuple[str, str], files: int, switches: int
) -> None:
    found = way({"name": name, "heads": 2}, formula)
    assert len(found.files) <= files, found.files
    assert found.switches <= switches and found.depth <= 11, found


def test_the_page_names_the_files_of_the_way() -> None:
    found = way({"name": "gated_delta", "heads": 2}, ("memories/delta/rule.py", "recurrent"))
    table = re.findall(r"^\|.*\[([\w/.]+)\]\(\.\./\1\) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(table) == sorted(found.files)


def listing() -> str:
    text = PAGE.read_text()
    (code,) = re.findall(r"<!-- listing -->\n```python\n(.*?)```\n<!-- /listing -->", text, re.S)
    return code


def test_the_listing_is_short() -> None:
    assert len(listing().splitlines()) < 150 and "layerzoo" not in listing()


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_the_listing_is_the_product(impl: str) -> None:
    """A product block and the page's, with the same weights: outputs and gradients."""
    page: dict[str, Any] = {}
    exec(listing(), page)
    layers = [{"name": "gated_delta", "heads": 2}]
    model = LanguageModel(vocab_size=4, dim=32, depth=1, layers=layers, mlp=2.0, impl=impl)
    (product,) = model.double().blocks
    block = page["Block"](dim=32, heads=2).double()
    block.load_state_dict(product.state_dict())
    x = torch.randn(2, 37, 32, dtype=torch.float64, requires_grad=True)
    got = block(x, page[impl])
    want, _ = product(x, product.init_state(2))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    found, expected = (
        gradients((y * weight).sum(), x, part) for y, part in ((got, block), (want, product))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def gradients(loss: torch.Tensor, x: torch.Tensor, part: torch.nn.Module) -> dict[str, Any]:
    names = ["x", *dict(part.named_parameters())]
    return dict(zip(names, torch.autograd.grad(loss, [x, *part.parameters()]), strict=True))
