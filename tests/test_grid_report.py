"""Sizes of a grid, layers set by name, and what its report compares."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from layerzoo import SpecError
from layerzoo.ablations.cells.grid import Grid, load_grid
from layerzoo.ablations.cells.report_options import Contrast

LAYERS = "model.network.layers"
HYBRID = "[{name: parallel, children: [{name: sliding, window: 8}, {name: linear, decay: none}]}]"
AXES = f"""
  parts:
    window: {{model.network.layers: [{{name: sliding, window: 8}}]}}
    hybrid: {{model.network.layers: {HYBRID}}}
  decay:
    none: {{}}
    scalar: {{model.network.layers.linear.decay: scalar}}
  conv:
    on: {{}}
    off: {{model.network.conv: 0}}
"""
FIELDS = {"name": "tiny", "base": "mqar", "axes": AXES, "when": "{decay: {parts: hybrid}}"}
SIZES = """
  small: {}
  large:
    set: {model.network.dim: 256, model.lr: 1e-3}
    axes: {decay: {vector: {model.network.layers.linear.decay: vector}}}
    seeds: [7]
"""


def read(folder: Path, size: str | None = None, **fields: str) -> Grid:
    path = folder / "grid.yaml"
    text = "".join(f"{name}: {value}\n" for name, value in {**FIELDS, **fields}.items() if value)
    path.write_text(f"# Why?\n{text}")
    return load_grid(str(path), size)


def networks(grid: Grid) -> dict[str, Any]:
    return {cell.arm: cell.config["model"]["network"] for cell in grid.cells()}


def test_a_size_changes_fields_and_entries(tmp_path: Path) -> None:
    common = "{model.network.dim: 64, data.init_args.pairs: 4}"
    small = read(tmp_path, sizes=SIZES, set=common)
    assert (small.name, small.source.question, len(small.seeds)) == ("tiny", "Why?", 3)
    assert {net["dim"] for net in networks(small).values()} == {64}
    large = read(tmp_path, "large", sizes=SIZES, set=common)
    assert large.name == "tiny-large" and [seed.init for seed in large.seeds] == [7]
    assert [*networks(large)] == [
        "window,on",
        "window,off",
        "hybrid,vector,on",
        "hybrid,vector,off",
    ]
    for cell in large.cells():
        assert cell.config["model"]["network"]["dim"] == 256 and cell.config["model"]["lr"] == 1e-3
        assert cell.config["data"]["init_args"]["pairs"] == 4

    # A copy of the file is of the same size, whatever it was of before.
    for text in (large.source.copy, re.sub("size: large", "size: small", large.source.copy)):
        path = tmp_path / "copy.yaml"
        path.write_text(text)
        name = "tiny-large" if "size: large" in text else "tiny"
        assert load_grid(str(path)).name == name
        assert load_grid(str(path), "large").source.copy == large.source.copy
    assert read(tmp_path).source.copy == (tmp_path / "grid.yaml").read_text()


def test_a_name_stands_for_all_layers_of_it(tmp_path: Path) -> None:
    two = f"[{{name: sequential, children: {HYBRID}}}, {{name: linear}}]"
    changes = {f"{LAYERS}.linear.decay": "scalar", f"{LAYERS}.parallel.scale_init": 0.5}
    axes = f"\n  parts: {{a: {{{LAYERS}: {two}}}}}\n  decay: {{scalar: {json.dumps(changes)}}}"
    (network,) = networks(read(tmp_path, axes=axes, when="", seeds="[0]")).values()
    deep, flat = network["layers"]
    (parallel,) = deep["children"]
    assert flat["decay"] == "scalar" and parallel["scale_init"] == 0.5
    assert [child.get("decay") for child in parallel["children"]] == [None, "scalar"]


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    more = "{<<: &x {model.network.dim: 16, model.network.depth: 1, model.lr: 0.5}, model.lr: 0.1}"
    axes = f"\n  x:\n    a: {more}\n    b: {{model.network.dim: 32, <<: *x}}"
    cells = read(tmp_path, axes=axes, when="", seeds="[0]").cells()
    found = [(c["model"]["network"]["dim"], c["model"]["lr"]) for c in (x.config for x in cells)]
    assert found == [(16, 0.1), (32, 0.5)]


@pytest.mark.parametrize(
    ("contrasts", "pairs"),
    [
        ("[['hybrid,none,on', 'window,on']]", [("hybrid,none,on", "window,on")]),
        (
            "[{decay: [scalar, none]}]",
            [(f"hybrid,scalar,{conv}", f"hybrid,none,{conv}") for conv in ("on", "off")],
        ),
        ("[{decay: [scalar, none], conv: off}]", [("hybrid,scalar,off", "hybrid,none,off")]),
        # Of two arms those axes must agree that both have.
        (
            "[{parts: [hybrid, window], decay: scalar}]",
            [(f"hybrid,scalar,{conv}", f"window,{conv}") for conv in ("on", "off")],
        ),
    ],
)
def test_a_contrast_pairs_arms(
    tmp_path: Path, contrasts: str, pairs: list[tuple[str, str]]
) -> None:
    report = read(tmp_path, report=f"{{contrasts: {contrasts}}}").report
    assert report is not None
    (contrast,) = report.contrasts
    assert contrast.pairs == tuple(pairs)


def test_a_baseline_is_compared_with_every_arm(tmp_path: Path) -> None:
    laws = "[{y: loss/held_out, x: [parameters], by: [parts]}]"
    contrasts = "[['window,off', 'hybrid,none,on']]"
    fields = f"baseline: 'window,on', contrasts: {contrasts}, scaling: {laws}"
    report = read(tmp_path, report=f"{{{fields}}}").report
    assert report is not None and report.scaling[0].by == ("parts",)
    base = "window,on"
    others = [
        "window,off",
        *(f"hybrid,{d},{c}" for d in ("none", "scalar") for c in ("on", "off")),
    ]
    first, last = report.contrasts[0], report.contrasts[-1]
    assert first == Contrast("conv: off - on", (("window,off", base),))
    labels = ["parts: hybrid - window", f"hybrid,none,off - {base}"]  # one axis differs, or two
    assert [c.label for c in report.contrasts[1:3]] == labels
    assert [c.pairs for c in report.contrasts[:-1]] == [((arm, base),) for arm in others]
    assert last.pairs == (("window,off", "hybrid,none,on"),)


FAULTS = [
    ({"sizes": "[small] # <-"}, "sizes: expected sizes, name: {field: value}"),
    ({"sizes": "\n  small: 3 # <-"}, "sizes.small: expected field: value, got 3"),
    ({"sizes": "# <-\n  small: {}", "size": "lage"}, "sizes: no size 'lage'; known: small"),
    ({"sizes": "\n  big:\n    buget: 3 # <-"}, "unknown field 'buget'; did you mean 'budget'?"),
    (
        {"sizes": "\n  big:\n    set:\n      model.lr: 1\n      model.lrr: 1 # <-"},
        "set.model.lrr: model.lrr: no such option; did you mean 'lr'?",
    ),
    ({"report": "{baseline: 'window,onn'} # <-"}, "report.baseline: no arm 'window,onn'; did you"),
    (
        {"report": "{contrasts: [{decy: [scalar, none]}]} # <-"},
        "no such axis; did you mean 'decay",
    ),
    ({"report": "{contrasts: [{decay: scalar}]} # <-"}, "expected one axis with two options"),
    ({"report": "{contrasts: [{decay: [none, none]}]} # <-"}, "expected two different options"),
    ({"report": "{contrasts: [{decay: [none, sclar]}]} # <-"}, "no option 'sclar'; did you mean"),
    (
        {"report": "{contrasts: [{decay: [none, scalar], parts: window}]} # <-"},
        "no two of these arms differ in decay alone",
    ),
    ({"report": "{scaling: [{y: a, x: [b], by: [part]}]} # <-"}, "scaling.0.by.0: no such axis"),
    ({"report": "{scaling: [{y: a, x: []}]} # <-"}, "report.scaling.0: x: needs one size or two"),
    ({"report": "{scaling: [a]} # <-"}, "report.scaling.0: expected y, x, .., got 'a'"),
]


@pytest.mark.parametrize(("fields", "message"), FAULTS)
def test_a_wrong_report_or_size_is_refused_at_its_line(
    tmp_path: Path, refused: Any, fields: dict[str, str], message: str
) -> None:
    with refused(message):
        read(tmp_path, **fields)


def test_a_layer_that_no_arm_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"layers has no layer 'liner'; did you mean 'linear'\?"):
        read(tmp_path, axes=AXES.replace("layers.linear", "layers.liner"))
