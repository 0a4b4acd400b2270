"""The registry: what registers, what is refused in which words, and what an import drags in."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from layerzoo import Layer, SpecError, build, get_layer, list_layers
from layerzoo.spec import Config


def declare(name: str, **body: Any) -> type[Layer]:
    """The class statement of a minimal layer."""

    class Nothing(Config):
        pass

    good = {"Config": Nothing, "source": "a test", "cases": ({},)}
    body = {key: value for key, value in {**good, **body}.items() if value is not None}
    return type(Layer)("Declared", (Layer,), body, name=name)


def test_a_class_statement_registers(registry: dict[str, type[Layer]]) -> None:
    cls = declare("declared")
    assert registry["declared"] is cls is get_layer("declared")
    assert "declared" in list_layers() and "declared" not in list_layers("memory")
    assert build("declared", dim=3).spec() == {"name": "declared"}


def test_the_fixture_forgets_test_layers() -> None:
    assert "declared" not in list_layers()


def test_an_abstract_base_does_not_register(registry: dict[str, type[Layer]]) -> None:
    before = dict(registry)
    type(Layer)("Base", (Layer,), {})
    assert registry == before


@pytest.mark.parametrize(
    "name, body, message",
    [
        ("linear", {}, r"'linear' is already registered by layerzoo.memories.linear.rule.Linear"),
        ("new", {"Config": None}, r"'new' \(Declared\) has no nested Config class"),
        ("new", {"Config": nn.Module}, r"'new' \(Declared\) has no nested Config class"),
        ("new", {"cases": None}, r"'new' \(Declared\) must declare cases and source"),
        ("new", {"cases": ()}, r"'new' \(Declared\) must declare cases and source"),
        ("new", {"source": None}, r"'new' \(Declared\) must declare cases and source"),
    ],
)
def test_what_does_not_register(
    registry: dict[str, type[Layer]], name: str, body: dict[str, Any], message: str
) -> None:
    before = dict(registry)
    with pytest.raises(TypeError, match=message):
        declare(name, **body)
    assert registry == before


def test_kinds_are_a_partition() -> None:
    kinds = [list_layers(kind) for kind in ("memory", "attention", "composition")]
    together = [name for names in kinds for name in names]
    assert sorted(together) == list_layers() == sorted(set(list_layers()))
    assert {"linear", "gated_delta"} <= set(kinds[0]) and {"sliding", "softmax"} <= set(kinds[1])


LINEAR = {"name": "linear", "heads": 2}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("linaer", "unknown layer 'linaer'; did you mean 'linear'?"),
        ("zzz", f"unknown layer 'zzz'; known: {', '.join(list_layers())}"),
        ({"name": None}, "unknown layer 'None'"),
        ({"heads": 2}, "a layer spec needs a name"),
        (3, "a layer spec is a name or a mapping, got 3"),
        ({"name": "linear", "head": 2}, "linear: unknown field 'head'; did you mean 'heads'?"),
        ({"name": "linear", "zzz": 2}, "linear: unknown field 'zzz'; known: decay, decay_gate, "),
        ({"name": "parallel"}, "parallel: children: missing, and it has no default"),
        ({"name": "linear", "heads": "two"}, "linear: heads: expected int, got 'two'"),
        ({"name": "linear", "heads": True}, "linear: heads: expected int, got True"),
        ({"name": "linear", "heads": 2.0}, "linear: heads: expected int, got 2.0"),
        ({"name": "linear", "heads": 0}, "linear: heads: must be at least 1, got 0"),
        ({"name": "linear", "key_dim": 0}, "linear: key_dim: must be at least 1, got 0"),
        ({"name": "linear", "key_dim": "x"}, "linear: key_dim: expected int or null, got 'x'"),
        ({"name": "linear", "heads": 5}, "linear: heads (or give key_dim and value_dim): 5 does"),
        (
            {"name": "linear", "decay": "scaler"},
            "linear: decay: expected one of 'none', 'constant', 'scalar', 'vector', got 'scaler'",
        ),
        (
            {"name": "softmax", "heads": 5},
            "softmax: heads (or give key_dim and value_dim): 5 does",
        ),
        ({"name": "softmax", "heads": 8}, "softmax: rotary: needs an even key_dim, got 3; or"),
        (
            {"name": "kda", "qk_norm": "rms"},
            "kda: qk_norm: expected one of 'l2', got 'rms': a delta rule needs keys of ",
        ),
        (
            {"name": "mesa", "decay": "vector"},
            "mesa: decay: expected one of 'none', 'constant', 'scalar', got 'vector': with a ",
        ),
        ({"name": "softmax", "rotary": 0}, "softmax: rotary: must be positive or null, got 0"),
        ({"name": "softmax", "qk_norm": 1}, "softmax: qk_norm: expected one of 'l2', 'rms', "),
        ({"name": "softmax", "qk_norm": True}, "softmax: qk_norm: true is now rms, and false"),
        ({"name": "sliding", "out_gate": False}, "sliding: out_gate: true is now sigmoid, and"),
        ({"name": "latent", "head_dim": 8}, "latent: head_dim: is now key_dim and value_dim, one"),
        ({"name": "delta", "heads": 4, "key_heads": 3}, "delta: key_heads: 3 does not divide 4"),
        ({"name": "gla", "decay_rate": [2.0, 1.0]}, "gla: decay_rate: expected a range, 0 < low"),
        ({"name": "gla", "decay_step": [0.1]}, "gla: decay_step: expected a range, 0 < low <= h"),
        (
            {"name": "kda", "decay_gate": "bounded", "decay_rate": [1, 60]},
            "kda: decay_gate: bounded is above -5, and cannot start at a rate x step of 6; lower",
        ),
        (
            {"name": "linear", "feature_map": "relu", "rotary": 100.0},
            "linear: rotary: turns q and k before feature_map 'relu', behind which",
        ),
        (
            {
                "name": "delta",
                "rotary": 100.0,
                "rotary_scaling": {"name": "yarn", "factor": 4, "original_length": 64},
            },
            "delta: rotary_scaling: lengthens queries and keys, which a memory's rule depends on;",
        ),
        ({"name": "softmax", "heads": 4, "kv_heads": 3}, "softmax: kv_heads: 3 does not divide 4"),
        ({"name": "softmax", "kv_heads": 0}, "softmax: kv_heads: must be at least 1, got 0"),
        ({"name": "sliding", "window": 0}, "sliding: window: must be at least 1"),
        ({"name": "sliding", "sinks": -1}, "sliding: sinks: must not be negative, got -1"),
        ({"name": "parallel", "children": []}, "parallel: children: needs at least one layer"),
        ({"name": "parallel", "children": "linear"}, "parallel: children: expected a list of"),
        (
            {"name": "parallel", "children": [LINEAR, "linaer"]},
            "parallel: children[1]: unknown layer 'linaer'; did you mean 'linear'?",
        ),
        (
            {"name": "parallel", "children": [LINEAR, {"name": "linear", "heads": 5}]},
            "parallel: children[1]: linear: heads (or give key_dim and value_dim): 5 does not",
        ),
        (
            {"name": "parallel", "children": [{"name": "parallel", "children": [LINEAR, 7]}]},
            "parallel: children[0]: parallel: children[1]: a layer spec is a name or a mapping",
        ),
        (
            {"name": "parallel", "children": [LINEAR, {**LINEAR, "dim": 7}]},
            "parallel: children[1]: dim: 7 in the spec contradicts 24",
        ),
    ],
)
def test_errors_name_the_place_and_the_way_out(spec: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        build(spec, dim=24)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dim", [None, 0, -4, 2.0, "24", True])
def test_dim_is_a_positive_int(dim: Any) -> None:
    with pytest.raises(SpecError, match="linear: dim: expected a positive int, got"):
        build("linear", dim=dim)


def test_dim_in_the_spec() -> None:
    assert build({**LINEAR, "dim": 12}).dim == build({**LINEAR, "dim": 12}, dim=12).dim == 12
    with pytest.raises(SpecError, match="dim: 12 in the spec contradicts 24"):
        build({**LINEAR, "dim": 12}, dim=24)
    spec = {**LINEAR, "dim": 12}
    build(spec)
    assert spec == {**LINEAR, "dim": 12}, "build must not change the caller's mapping"


def test_keywords_win_over_the_mapping() -> None:
    assert build(LINEAR, dim=24, heads=3).heads == 3


def test_configs_are_frozen_and_compare() -> None:
    config = build(LINEAR, dim=24).config
    assert config == get_layer("linear").Config(heads=2) != get_layer("linear").Config(heads=3)
    with pytest.raises(AttributeError):
        config.heads = 3


def test_built_layers_as_children() -> None:
    child = build(LINEAR, dim=24)
    assert build(child) is child and build(child, dim=24) is child
    layer = build("parallel", dim=24, children=[child, "softmax"])
    assert layer.layers[0] is child
    assert build(layer.spec(), dim=24).spec() == layer.spec()
    layer.impl = "recurrent"
    assert child.impl == "recurrent", "impl reaches the children"
    assert (child.checkpoint, child.compiled) == (False, False)
    layer.checkpoint = layer.compiled = True
    assert (child.checkpoint, child.compiled) == (True, True)
    with pytest.raises(SpecError, match="compiled 'fast' is unknown; known: False, True"):
        layer.compiled = "fast"
    with pytest.raises(SpecError, match="linear: already built with dim=24"):
        build(child, dim=12)
    with pytest.raises(SpecError, match="linear: already built with dim=24"):
        build(child, heads=3)
    with pytest.raises(SpecError, match=r"parallel: children\[0\]: linear: already built"):
        build("parallel", dim=12, children=[child])


HEAVY = ("lightning", "omegaconf", "triton", "transformers", "pytorch_lightning", "jsonargparse")
PEERS = ("matplotlib", "transformers", "fla", "titans_pytorch", "local_attention", "einops")
RUN = """
import contextlib, io
from layerzoo.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main({}) == 0
""".format
LIGHT = {
    "import layerzoo": (*HEAVY, "torch._dynamo"),
    "from layerzoo.memories import linear_attention, delta_rule, mesa": (*HEAVY, "torch._dynamo"),
    "from layerzoo.attention import softmax_attention, sliding_attention": (
        *HEAVY,
        "torch._dynamo",
    ),
    "import layerzoo.memories.linear": HEAVY,
    "import layerzoo.attention.sliding": HEAVY,
    "import layerzoo.model": HEAVY,
    "layerzoo.list_layers()": (*HEAVY, *PEERS, "torch._dynamo"),
    RUN(["list"]): (*HEAVY, *PEERS, "torch._dynamo"),
    RUN(["ablate", "list"]): ("lightning", "torchmetrics", "transformers", "triton"),
    "from layerzoo.tools.bench.peers import PEERS; assert PEERS": (*PEERS, "lightning"),
}
"""Statements, and what must not have been imported behind each."""
LOOK = """
import json, sys
for statement, heavy in json.loads(sys.argv[1]).items():
    exec(statement)
    print(*([statement, name] for name in heavy if name in sys.modules))
"""


def test_imports_stay_light() -> None:
    """In a fresh interpreter, one for all: where one drags something in, those behind it have it,
    too, and the first is at fault."""
    command = [sys.executable, "-W", "error", "-c", LOOK, json.dumps(LIGHT)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == [] and found.stdout.count("\n") == len(LIGHT)


PLUGIN = """
from layerzoo.layer import Layer
from layerzoo.spec import Config

class Plugged(Layer, name="plugged"):
    class Config(Config):
        width: int = 3
    source = "a test"
    cases = ({},)
"""


@pytest.fixture
def undiscovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: dict[str, type[Layer]]
) -> Iterator[Path]:
    """A folder of installed packages, before any layer was looked for."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("layerzoo.registry._discovered", False)
    yield tmp_path
    sys.modules.pop("zoo_plugin", None)


def distribution(folder: Path, target: str) -> None:
    """An installed package, as pip leaves it, that offers a layer."""
    info = folder / "zoo_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[layerzoo.layers]\nplugged = {target}\n")
    (folder / "zoo_plugin.py").write_text(PLUGIN)


def test_entry_points_add_layers(undiscovered: Path) -> None:
    distribution(undiscovered, "zoo_plugin:Plugged")
    assert "plugged" in list_layers()
    assert build("plugged", dim=4, width=5).spec() == {"name": "plugged", "width": 5}


@pytest.mark.parametrize("target", ["zoo_plugin:Missing", "zoo_missing:Plugged"])
def test_a_broken_entry_point_says_whose_it_is(undiscovered: Path, target: str) -> None:
    """Every time: a second call must not quietly list a zoo that lacks what comes after it."""
    distribution(undiscovered, target)
    for _ in range(2):
        with pytest.raises(SpecError) as error:
            list_layers()
        message = str(error.value)
        assert message.startswith(f"entry point 'plugged = {target}' of zoo-plugin does not")
        assert message.endswith("mend or uninstall it") and "\n" not in message


@pytest.mark.parametrize("name", [*list_layers("memory"), *list_layers("attention")])
def test_a_layer_says_its_formula_and_every_symbol(name: str) -> None:
    """A sentence, a formula, and below *where* an entry for each symbol."""
    cls = get_layer(name)
    op = next((fn for fn in vars(sys.modules[cls.__module__]).values() if is_op(fn)), None)
    for thing in filter(None, (cls, op)):
        text = inspect.getdoc(thing) or ""
        first, formula, _ = re.split(r"\n\n", text)[:3]
        assert first.endswith("."), thing
        assert re.search(r"=|<-|update:", formula), thing
        assert re.search(r"\n\nwhere\n\n- ", text), f"{thing}: no symbols below 'where'"
    for parameter in inspect.signature(op).parameters if op else ():
        assert re.search(rf"^    {parameter}: \S", inspect.getdoc(op) or "", re.MULTILINE), (
            f"{op}: {parameter} is not explained on a line of its own"
        )


def is_op(thing: Any) -> bool:
    """Whether it is a public op, which takes an impl by keyword."""
    found = inspect.signature(thing).parameters.get("impl") if inspect.isfunction(thing) else None
    return found is not None and found.kind is found.KEYWORD_ONLY
