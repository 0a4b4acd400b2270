"""The private names of other libraries: all are there, and all are used in one file."""

from __future__ import annotations

import argparse
import ast
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI

from layerzoo.support import internals
from layerzoo.train.command import TrainCLI
from layerzoo.train.parser import TrainingParser

ROOT = Path(__file__).parents[1]
FOLDERS = ("layerzoo", "memories", "attention", "kernels", "ablations")
ALLOWED = {
    *("_replace", "_asdict", "_fields", "_field_defaults", "_make"),  # public, of named tuples
    *(
        "_C",
        "_are_functorch_transforms_active",
        "_linalg_solve_ex",
    ),  # torch's own, which fail loudly
}
MODULES = ("torch.utils._pytree", "torch._dynamo.exc")
"""Private modules of torch: an import of one that is gone fails loudly."""


def owner(library: str, path: list[str]) -> Any:
    """The object that a name of NAMES is looked up in."""
    if library == "lightning":
        cli = path[0] == "LightningCLI"
        found: Any = LightningCLI if cli else Trainer(logger=False, enable_checkpointing=False)
    elif library == "transformers":
        found = pytest.importorskip("transformers").LlamaConfig()
    elif library == "ray":
        found = pytest.importorskip("ray")
    elif path == ["argparse"]:
        return argparse
    else:
        found = TrainingParser(exit_on_error=False) if library == "jsonargparse" else None
        found = found or argparse.ArgumentParser()
        if library == "jsonargparse":
            found.add_argument("--number", type=int | None)
            found.add_subcommands().add_subcommand("fit", TrainingParser(exit_on_error=False))
    for name in path[1:]:
        if name.endswith("[Union]"):
            actions = getattr(found, name.removesuffix("[Union]"))
            found = next(action for action in actions if action.dest == "number")
        else:
            found = getattr(found, name)
    return found


NAMES = [(library, name) for library, names in internals.NAMES.items() for name in names]


@pytest.mark.parametrize(("library", "name"), NAMES)
def test_no_version_lacks_a_name(library: str, name: str) -> None:
    path = name.split(".")
    found = owner(library, path[:-1] or ["argparse"])
    installed = "" if library == "argparse" else version(library)
    assert hasattr(found, path[-1]), f"{library} {installed} has no {name}"


def test_a_name_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LightningCLI, "_parse_ckpt_path")
    with pytest.raises(AssertionError, match=r"lightning \d.* has no LightningCLI\._parse_ckpt_p"):
        test_no_version_lacks_a_name("lightning", "LightningCLI._parse_ckpt_path")


def test_every_name_is_in_the_table() -> None:
    """What `internals` uses is in NAMES, and no other file uses a private name of a library."""
    trees = {
        path: ast.parse(path.read_text())
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    own = {name for tree in trees.values() for name in _defined(tree)} | ALLOWED
    table = {part for _, name in NAMES for part in re.split(r"[.\[\]]", name)}
    strangers = []
    for path, tree in trees.items():
        place = path.relative_to(ROOT).as_posix()
        for name in _private(tree):
            known = table if place == "layerzoo/support/internals.py" else own
            if name not in known:
                strangers.append(f"{place}: {name}")
    assert not strangers


def _private(tree: ast.AST) -> list[str]:
    nodes = [*ast.walk(tree)]
    found = [n.attr for n in nodes if isinstance(n, ast.Attribute)]
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module not in MODULES]
    found += [alias.name for n in imports for alias in n.names]
    found += [part for n in imports for part in (n.module or "").split(".")]
    return [name for name in found if re.match(r"_[A-Za-z]", name)]


def _defined(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.append(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_the_training_commands_read_checkpoints_as_we_do() -> None:
    assert TrainCLI._parse_ckpt_path is TrainCLI.read_checkpoint
