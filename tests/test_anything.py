"""Whatever a user writes, a command answers: commands, specs, grids and files are drawn, and there
is no traceback, no hang, and nothing half-written.

About 170 inputs are drawn in the suite, the same ones each time; `pytest -m slow` of this file
draws more than 2,000.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning import Trainer

from layerzoo import SpecError, build, get_layer, list_layers
from layerzoo.ablations.cells.grid import shipped_grids
from layerzoo.cli import main
from layerzoo.model import ModelConfig
from layerzoo.support.yaml_files import named_configs
from layerzoo.train.lit import LitModel

pytestmark = pytest.mark.filterwarnings("default")
SECONDS = 60
COUNTS = [
    pytest.param(15, id="few"),
    pytest.param(500, id="many", marks=pytest.mark.slow),
]

numbers = st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 8, 16, 2**31, 2**63, 2**64])
reals = st.sampled_from([0.0, -0.5, 0.5, 1.5, 1e-30, 1e30, float("nan"), float("inf")])
words = st.sampled_from(["", "x", "linear", "none", "é", "{", "- a", "a: b", "%", "../x", "null"])
junk: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | reals | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


class Hangs(BaseException):
    """Not an Exception: nothing may catch it."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hangs(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def draws(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    few = settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    few(given(strategy)(lambda drawn: check(drawn)))()


def answers(*argv: str) -> int:
    """The exit status of a command, which is 0, 1 or 2, with one line behind a 2, and behind a 1
    of training that diverged."""
    out, err = io.StringIO(), io.StringIO()
    with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as end:  # argparse's, of --help
            assert end.code in (0, None)
            return 0
    said = [line for line in err.getvalue().splitlines() if line.startswith("layerzoo: ")]
    assert status in (0, 1, 2), (status, said)
    diverged = status == 1 and any(line.startswith("layerzoo: diverged: ") for line in said)
    assert len(said) == (status == 2 or diverged), (status, err.getvalue())
    assert all(len(line) < 2000 for line in said)
    return status


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@st.composite
def specs(draw: Any) -> Any:
    """A layer with some of its fields, most of them of values that fit their types."""
    name = draw(st.sampled_from([*list_layers(), "linaer"]))
    known = [f.name for f in get_layer(name).Config.fields()] if name in list_layers() else []
    values = numbers | reals | words | st.booleans() | junk
    child = st.sampled_from(["linear", {"name": "sliding", "window": 4}, "nosuch"])
    fields = draw(st.dictionaries(st.sampled_from([*known, "hedas"]), values, max_size=3))
    if "children" in known and draw(st.booleans()):
        fields["children"] = draw(st.lists(child, max_size=3))
    if "child" in known and draw(st.booleans()):
        fields["child"] = draw(child)
    return {"name": name, **fields}


@pytest.mark.parametrize("count", COUNTS)
def test_specs(count: int) -> None:
    x = torch.randn(1, 5, 16)

    def check(drawn: tuple[Any, Any]) -> None:
        spec, dim = drawn
        with limited(), contextlib.suppress(SpecError):
            layer = build(spec, dim=dim)
            if dim == 16:
                layer(x)

    draws(count, st.tuples(specs(), st.sampled_from([16, 16, 16, 0, 7, 1, None, "x"])), check)


VALUES = ["", "1", "0", "-1", "2", "1,2", "x", "é", "[", "{", "{a: 1}", "[1]", "nan", "1e400"]
VALUES += [
    "18446744073709551617",
    "null",
    "true",
    "nowhere",
    "/proc/x",
    "file",
    "folder",
    "file/x",
    "linear",
    "MQAR",
]
OPTIONS = {
    "list": ["--tasks", "--json", "delta", "MQAR", "nosuch"],
    "describe": ["--config", "--network", "--length", "--dtype", "--json", "--model.network.dim"],
    "generate": [
        *("file", "folder", "nowhere", "last", "--prompt", "--tokens", "--top_k", "--top_p"),
        *("--temperature", "--state", "--save_state", "--seed", "--stop", "--piece", "--impl"),
    ],
    "ablate": ["list", "status", "report", "folder", "file", "--json", "--to", "--size", "plan"],
    "bench": ["ops", "layers", "generate", "compile", "--lengths", "--against", "--measure"],
    "convert": ["--source", "--out", "--memory", "--window", "--layers", "--dtype"],
    "evaluate": ["folder", "--out", "--control", "--lengths", "--kinds", "--text", "--device"],
    "test": ["--config", "--ckpt_path", "--data", "--trainer.logger"],
    "lisst": ["--help"],
}


@st.composite
def commands(draw: Any) -> list[str]:
    command = draw(st.sampled_from([*OPTIONS]))
    word = st.sampled_from([*OPTIONS[command], *VALUES]) | st.sampled_from(OPTIONS[command])
    return [command, *draw(st.lists(word, max_size=5))]


@pytest.mark.parametrize("count", COUNTS)
def test_commands(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("a: b\n")
    Path("folder").mkdir()
    # It takes its time.
    monkeypatch.setattr("layerzoo.tools.bench.command.run_benchmarks", lambda *args: None)
    monkeypatch.setattr("layerzoo.tools.bench.stream.in_a_process", lambda *args: [])

    def check(argv: list[str]) -> None:
        answers(*argv)
        assert not [*Path().rglob("*.part")]

    draws(count, commands(), check)


SMALL = [
    *("--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--data.batch_size", "8"),
    *("--data.train_samples", "8", "--data.val_samples", "8", "--trainer.logger", "false"),
    *("--model.network.dim", "8", "--model.network.layers", "[{name: linear, heads: 1}]"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"),
]
FIELDS = ["lr", "warmup", "schedule", "betas", "impl", "network.dim", "network.conv"]
FIELDS = [f"model.{name}" for name in [*FIELDS, "network.layers", "network.mlp", "network.x"]]
FIELDS += [f"data.{name}" for name in ("pairs", "seed", "alpha", "setting", "vocab_size", "x")]
FIELDS += [f"trainer.{name}" for name in ("precision", "max_steps", "accelerator", "profiler")]
FIELDS += [f"trainer.{name}" for name in ("val_check_interval", "gradient_clip_val", "x")]
FIELDS += ["seed_everything", "ckpt_path", "data", "model", "module", "config"]


@pytest.mark.parametrize("count", [pytest.param(8, id="few"), COUNTS[1]])
def test_training(count: int) -> None:
    options = st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES)), max_size=2)

    def check(drawn: list[tuple[str, str]]) -> None:
        more = [word for name, value in drawn for word in (f"--{name}", value)]
        answers("fit", "--config", "mqar", *SMALL, *more)

    draws(count, options, check)


@st.composite
def mutants(draw: Any, tree: Any) -> Any:
    """A tree with one or two of its nodes replaced, dropped or named otherwise."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        node, parent, key = tree, None, None
        for _ in range(draw(st.integers(1, 5))):
            if not isinstance(node, (dict, list)) or not node:
                break
            keys = [*node] if isinstance(node, dict) else [*range(len(node))]
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if parent is None:
            return tree
        match draw(st.integers(0, 3)):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(words)] = parent.pop(key)
            case _:
                parent[key] = draw(junk)
    return tree


OPTIONS_OF_CELLS = [
    *(f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters),
    *(f"model.{name}" for name in inspect.signature(LitModel.__init__).parameters),
    *(f"model.network.{field.name}" for field in ModelConfig.fields()),
    *("trainer", "model", "data", "data.init_args", "data.init_args.lengths", "seed_everything"),
]


@st.composite
def grids(draw: Any) -> Any:
    """A shipped grid with a fault in it, or with an option that it sets to any value."""
    names = ("quickstart", "parity", "scaling", "forgetting")
    path = shipped_grids()[draw(st.sampled_from(names))]
    tree = yaml.safe_load(path.read_text())
    if draw(st.booleans()):
        return draw(mutants(tree))
    value = numbers | reals | st.sampled_from(VALUES) | junk
    return tree | {"set": {draw(st.sampled_from(OPTIONS_OF_CELLS)): draw(value)}}


@pytest.mark.parametrize("count", COUNTS)
def test_grids(count: int) -> None:
    def check(tree: Any) -> None:
        Path("grid.yaml").write_text(yaml.safe_dump(tree))
        answers("ablate", "plan", "grid.yaml", "--no-probe")

    draws(count, grids(), check)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """A file that was cut off, or of which some bytes are others."""
    match draw(st.integers(0, 2)):
        case 0:
            return content[: draw(st.integers(0, len(content)))]
        case 1:
            return draw(st.binary(max_size=64))
        case _:
            where = draw(st.integers(0, len(content)))
            return content[:where] + draw(st.binary(min_size=1, max_size=8)) + content[where + 1 :]


@pytest.mark.parametrize("count", COUNTS)
def test_files(count: int, write_results: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    network = {"vocab_size": 16, "dim": 8, "layers": [{"name": "linear", "heads": 1}]}
    lit = LitModel(network=ModelConfig.from_fields(network))
    content = {"state_dict": lit.state_dict(), "hyper_parameters": dict(lit.hparams)}
    torch.save(content, "whole.ckpt")
    generate = ("generate", "whole.ckpt", "--tokens", "1", "--max_new_tokens", "1")
    assert answers(*generate, "--save_state", "state") == 0
    axes = {"lr": {"a": {"model.lr": 0.1}, "b": {"model.lr": 0.2}}}
    results = write_results(
        lambda arm, seed: {"recall/accuracy": 0.5, "loss/held_out": 1.0}, axes=axes
    )
    cell = results / "a" / "seed-0"
    targets: dict[str, tuple[Path, tuple[str, ...]]] = {
        "checkpoint": (
            Path("whole.ckpt"),
            ("generate", "copy", "--tokens", "1", "--max_new_tokens=1"),
        ),
        "state": (Path("state"), (*generate, "--state", "copy")),
        "config": (named_configs()["mqar"], ("describe", "--config", "copy")),
    }
    for path in (results / "cells.json", results / "grid.yaml", *cell.glob("*.json")):
        for command in ("status", "report"):
            targets[f"{command} {path.name}"] = (path, ("ablate", command, str(results)))
    inputs = st.sampled_from([*targets]).flatmap(
        lambda name: st.tuples(st.just(name), damaged(targets[name][0].read_bytes()))
    )

    def check(drawn: tuple[str, bytes]) -> None:
        path, argv = targets[drawn[0]]
        if "copy" in argv:
            Path("copy").write_bytes(drawn[1])
            answers(*argv)
            return
        before = path.read_bytes()
        try:
            path.write_bytes(drawn[1])
            answers(*argv)
        finally:
            path.write_bytes(before)
            shutil.rmtree(results / "report", ignore_errors=True)

    draws(count, inputs, check)
