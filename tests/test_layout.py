"""What each folder may import: the arrows between the parts of the product."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("layerzoo", "memories", "attention", "kernels", "ablations")
LAYER = "layerzoo"
"""The files directly in layerzoo/ that a layer needs."""
PUBLIC = {"callbacks", "checkpoints", "lit", "module"}
"""The files in layerzoo/ that name what a config names, whose class paths stand in YAML."""
ENTRY = {"__init__", "__main__", "cli"}
ARROWS = {
    LAYER: set(),
    "memories": {LAYER},
    "attention": {LAYER},
    "kernels": {"layerzoo.ops"},
    "generation": {LAYER},
    "model": {LAYER, "generation"},
    "metrics": {LAYER},
    "support": {LAYER},
    "data": {LAYER, "metrics", "support"},
    "train": {LAYER, "model", "data", "metrics", "support"},
    "hf": {LAYER, "generation", "model", "data", "support", "train"},
    "testing": {LAYER, "data"},
    "tools": {
        *(LAYER, "generation", "model", "metrics", "data", "support", "train", "hf", "testing"),
        "package",
    },
    "ablations": {LAYER, "model", "metrics", "data", "support", "train"},
    "public": {"train"},
    "entry": {LAYER, "support"},
}
"""Each part of the product, and the parts that it may import. None imports tools or ablations:
the commands are found by name."""
TORCH_ALONE = ("layerzoo", "memories", "attention", "generation", "model")
HEAVY = {
    *("lightning", "torchmetrics", "jsonargparse", "omegaconf", "transformers", "matplotlib"),
    *("pandas", "triton", "tensorboard", "scipy"),
}


def part_of(module: str) -> str:
    """The part that a module of the product belongs to."""
    names = module.split(".")
    if len(names) == 1:
        return "package"
    if names[1] in PUBLIC:
        return "public"
    if names[1] in ENTRY:
        return "entry"
    return names[1] if names[1] in ARROWS else LAYER


def modules() -> dict[str, Path]:
    """The files of the product by the names under which they are imported."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            names = path.relative_to(ROOT).with_suffix("").parts
            names = names if folder == "layerzoo" else ("layerzoo", *names)
            found[".".join(names)] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """What a file imports when it runs, as absolute names; not what it imports for types alone."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base = [*base, *((node.module or "").split(".") if node.module else [])]
            for alias in node.names:
                name = ".".join([*base, alias.name])
                yield name if name in MODULES else ".".join(base)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_what_its_folder_may(module: str) -> None:
    part = part_of(module)
    for name in imports(module):
        top = name.split(".")[0]
        if top == "layerzoo":
            to = part_of(name)
            allowed = to == part or to in ARROWS[part] or name in ARROWS[part]
            assert allowed or module == "layerzoo.__init__", f"{module} imports {name}"
        if top in HEAVY and part in TORCH_ALONE:
            raise AssertionError(f"{module} imports {top}")
        if top == "triton":
            assert part == "kernels", f"{module} imports triton"


def test_the_arrows_have_no_circle() -> None:
    done: set[str] = {"package", "layerzoo.ops"}
    while left := {part for part in ARROWS if part not in done}:
        free = {part for part in left if ARROWS[part] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


def test_the_root_holds_what_a_layer_needs() -> None:
    found = {path.stem for path in (ROOT / "layerzoo").glob("*.py")}
    layer = {
        "layer",
        "registry",
        "memory",
        "shell",
        "rotary",
        "attend",
        "nn",
        "ops",
        "signature",
        "annotations",
    }
    assert found == layer | {"spec"} | PUBLIC | ENTRY


PAGES = [path for path in ROOT.rglob("*.md") if ".venv" not in path.parts]


def test_the_pages_import_what_is_there() -> None:
    """Every import of ours in an example of a page, and every module that a page names."""
    found = {
        line.strip()
        for page in PAGES
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for line in block.splitlines()
        if re.match(r"\s*(from layerzoo[\w.]* import [\w, ]+|import layerzoo[\w.]*)$", line)
    }
    assert "from layerzoo.generation import load_state, save_state, stream" in found
    for line in sorted(found):
        exec(line, {})
