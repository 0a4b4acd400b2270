"""What else differs between the arms of a grid: what is told, and what is warned of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerzoo.ablations.cells.confounds import compared_pairs, find_confounds, value_text
from layerzoo.ablations.cells.differences import ComparedArm, config_differences
from layerzoo.ablations.cells.grid import Grid, load_grid
from layerzoo.ablations.planning.cautions import planned_confounds
from layerzoo.ablations.planning.plan import plan_command
from layerzoo.ablations.reporting.report_files import compare

WriteResults = Callable[..., Path]
SET = "{model.network.dim: 16, model.network.depth: 1, model.lr: 1e-2}"
CONTRASTS = "{contrasts: [[a, b]]}"
LAYERS = "model.network.layers"
SOFTMAX = "{name: softmax, heads: 2, rotary: null"
MEMORY = "{name: linear, heads: 2, out_norm: none, out_gate: none"


def read(folder: Path, options: str, **fields: str) -> Grid:
    """A grid of an axis with these options."""
    path = folder / "grid.yaml"
    tree = {"name": "tiny", "base": "mqar", "set": SET, "axes": f"{{x: {{{options}}}}}", **fields}
    path.write_text("".join(f"{name}: {value}\n" for name, value in tree.items()))
    return load_grid(str(path))


def hidden(grid: Grid) -> list[set[str]]:
    """What differs in each pair that is warned of, without the options saying so."""
    found = planned_confounds(grid, grid.cells()).hidden
    return [{*each["differs"]} for each in found]


def layers(*specs: str) -> str:
    return f"{{{LAYERS}: [{', '.join(specs)}]}}"


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        # One field of one rule, written in one arm, in both, by its name or in the whole.
        (f"a: {{}}, b: {{{LAYERS}.gated_delta.beta_max: 2}}", []),
        (f"a: {layers('{name: delta}')}, b: {layers('{name: delta, beta_max: 2}')}", []),
        ("a: {model.network.conv: 0}, b: {model.network.conv: 4}", []),
        # Two rules: their own fields belong to them; what every layer has does not.
        (f"a: {layers(MEMORY + '}')}, b: {layers('{name: delta, heads: 2, out_norm: none}')}", []),
        (f"a: {layers(MEMORY + '}')}, b: {layers('{name: delta, heads: 1}')}", [{"out_norm"}]),
        (f"a: {layers(MEMORY + '}')}, b: {layers(SOFTMAX + '}')}", [{"qk_norm"}]),
        (f"a: {layers(MEMORY + ', qk_norm: rms}')}, b: {layers(SOFTMAX + '}')}", []),
        # A width that only one of them writes.
        (f"a: {layers('{name: linear, heads: 2}')}, b: {layers('{name: delta}')}", [{"heads"}]),
        # A layer that is added to those of the other arm is compared with nothing.
        (
            f"a: {layers('{name: sliding}')}, b: "
            + layers("{name: parallel, children: [{name: sliding}, {name: linear}]}"),
            [],
        ),
        # An option that sets something beside what its axis is about.
        ("a: {model.network.conv: 0}, b: {model.network.conv: 4, model.lr: 0.1}", [{"model.lr"}]),
        ("a: {}, b: {model.network.conv: 4, model.lr: 0.1}", [{"model.network.conv", "model.lr"}]),
        (
            "a: {model.network.conv: 0}, b: {model.network.conv: 4, model.lr: 0.1}, "
            "c: {model.network.conv: 2}",
            [{"model.lr"}],
        ),
        # All options set both: the axis is about both.
        (
            "a: {model.network.conv: 0, model.lr: 0.2}, b: {model.network.conv: 4, model.lr: 0.1}",
            [],
        ),
        # Another task has other options, and another vocabulary.
        (
            "a: {data: {class_path: layerzoo.data.MQAR, init_args: {vocab_size: 64}}}, "
            "b: {data: {class_path: layerzoo.data.Compression, init_args: {vocab_size: 8}}}",
            [],
        ),
    ],
)
def test_what_the_axes_imply_is_told_from_what_they_hide(
    tmp_path: Path, options: str, differs: list[set[str]]
) -> None:
    assert hidden(read(tmp_path, options, report=CONTRASTS)) == differs


def test_a_hidden_second_difference_is_warned_of_in_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = read(
        tmp_path, f"a: {layers(MEMORY + '}')}, b: {layers(SOFTMAX + '}')}", report=CONTRASTS
    )
    assert plan_command(str(grid.source.path), probe=False, jobs=1, as_json=False) == 0
    screen = capsys.readouterr().out
    assert (
        "warning: a - b: differ in qk_norm (l2 against rms), which their options do not both "
        "write; make it equal, or write it in the options of both arms\n"
    ) in screen
    assert "The learning rate is 0.01 for every arm, and tuned for none.\n" in screen
    rows = [line.split() for line in screen[screen.index("what else differs") :].splitlines()]
    assert ["a", "l2"] in [row[:2] for row in rows] and ["b", "rms"] in [row[:2] for row in rows]
    assert plan_command(str(grid.source.path), probe=False, jobs=1, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["confounds"]
    assert found["facts"]["qk_norm"] == {"a": ["l2"], "b": ["rms"]}
    assert found["hidden"] == [
        {"pair": ["a", "b"], "differs": {"qk_norm": [["l2"], ["rms"]]}},
    ]


def test_a_clean_grid_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = read(tmp_path, f"a: {{}}, b: {{{LAYERS}.gated_delta.beta_max: 2}}", report=CONTRASTS)
    plan_command(str(grid.source.path), probe=False, jobs=1, as_json=False)
    screen = capsys.readouterr().out
    assert (
        "The arms that are compared differ in nothing else." in screen and "warning" not in screen
    )


def test_quickstart_tells_its_confounds(capsys: pytest.CaptureFixture[str]) -> None:
    """It contrasts no arms, so that each is compared with all."""
    assert plan_command("quickstart", probe=False, jobs=1, as_json=False) == 0
    screen = capsys.readouterr().out
    heads = screen[screen.index("what else differs") :].splitlines()[2]
    assert all(word in heads for word in ("parameters", "state bytes", "FLOPs per token"))
    assert "warning: arms that are compared are not equally large: at most parameters" in screen


def test_tuning_and_matching_are_told(tmp_path: Path) -> None:
    memory = "{name: linear, heads: 2, key_dim: 16}"
    options = f"a: {layers(memory)}, b: {layers('{name: linear, heads: 2, key_dim: 4}')}"
    tune = "{axes: {model.lr: [1e-3, 1e-2]}, seeds: [100]}"
    grid = read(tmp_path, options, tune=tune, match="{by: parameters, solve: [mlp]}")
    cells = grid.cells()
    next(cell for cell in cells if cell.arm == "b").config["model"]["lr"] = 0.1
    found = planned_confounds(grid, cells)
    assert found.warnings == [] and found.notes == ["The learning rate is tuned for every arm."]
    assert found.facts["model.lr"] == {"a": 0.01, "b": 0.1}
    assert len({*found.facts["model.network.mlp"].values()}) == 2


def test_sizes_are_warned_of_unless_the_axis_is_about_a_number(tmp_path: Path) -> None:
    for options, warned in (
        (f"a: {layers('linear')}, b: {layers('{name: linear, out_gate: silu}')}", True),
        ("a: {model.network.dim: 16}, b: {model.network.dim: 32}", False),
    ):
        grid = read(tmp_path, options, report=CONTRASTS)
        lines = planned_confounds(grid, grid.cells()).warnings
        assert [line[:47] for line in lines] == [
            "arms that are compared are not equally large: a"
        ] * warned


def test_pairs_are_those_of_contrasts_and_claims_or_differ_in_one_axis(tmp_path: Path) -> None:
    options = "a: {model.network.dim: 16}, b: {model.network.dim: 32}, c: {model.network.dim: 8}"
    claim = "[{arm: c, minus: b, metric: x, value: 1, tolerance: sign, source: me}]"
    for fields, pairs in (
        ({}, [("a", "b"), ("a", "c"), ("b", "c")]),
        ({"report": CONTRASTS}, [("a", "b")]),
        ({"report": "{baseline: a}", "expect": claim}, [("b", "a"), ("c", "a"), ("c", "b")]),
    ):
        grid = read(tmp_path, options, **fields)
        arms = {",".join(arm.values()): arm for arm in grid.arms}
        assert compared_pairs(grid.report, grid.claims, arms) == pairs
    two = {"1,1": {"x": "1", "y": "1"}, "1,2": {"x": "1", "y": "2"}, "2,2": {"x": "2", "y": "2"}}
    assert compared_pairs(None, [], two) == [("1,1", "1,2"), ("1,2", "2,2")]


def side(*specs: Any, **model: Any) -> ComparedArm:
    network = {"layers": [*specs]}
    return ComparedArm({}, {"data": {"class_path": "T"}, "model": {"network": network, **model}})


def test_layers_are_compared_by_name() -> None:
    one, two = {"name": "m", "window": 8}, {"name": "m", "window": 64}
    (found,) = config_differences(side(one, one, two), side(one, two, two))
    assert found.name == "window"
    names = [each.name for each in config_differences(side(one, two), side(one))]
    assert names == [LAYERS, "window"]
    # Of the layers that replace others, in which order a value comes is nothing.
    three = [{"name": name, "qk_norm": norm} for name, norm in (("a", "l2"), ("b", "rms"))]
    other = [{"name": "c", "qk_norm": "rms"}, {"name": "d", "qk_norm": "l2"}]
    assert [each.name for each in config_differences(side(*three), side(*other))] == [LAYERS]
    assert config_differences(side(one, impl="x"), side(one, impl="y")) == []


def test_tasks_of_two_classes_differ_in_their_class_alone() -> None:
    def of(task: str, **options: int) -> ComparedArm:
        data = {"class_path": task, "init_args": {**options, "seed": 0, "num_workers": 1}}
        return ComparedArm({}, {"data": data})

    names = [each.name for each in config_differences(of("A", pairs=2), of("B", keys=3))]
    assert names == ["data.class_path"]
    names = [each.name for each in config_differences(of("A", pairs=2), of("A", pairs=3))]
    assert names == ["data.init_args.pairs"]


def test_values_are_shown_in_few_words() -> None:
    controls = {"class_path": "layerzoo.callbacks.Controls", "init_args": {"off": [1]}}
    for value, shown in (
        (10000.0, "10000"),
        (1e-05, "1e-05"),
        (None, "none"),
        (True, "on"),
        (["l2", "rms"], "l2, rms"),
        ([controls], "Controls(off=1)"),
        ({"name": "mlp", "bias": False}, "mlp(bias=none)"),
    ):
        assert value_text(value) == shown


# Reports, of folders


def model(**fields: Any) -> dict[str, Any]:
    return {"lr": 0.01, "network": {"dim": 8, "layers": [fields]}}


SHELL = {"heads": 2, "out_norm": "none", "out_gate": "none"}
MODELS = {
    "window": model(name="sliding", **SHELL, qk_norm=False),
    "memory": model(name="linear", **SHELL, qk_norm="l2"),
}
AXES = {
    "layer": {
        "window": {LAYERS: [{"name": "sliding", "heads": 2}]},
        "memory": {LAYERS: [{"name": "linear", "heads": 2}]},
    }
}
REPORT = {"contrasts": [["memory", "window"]]}


def recall(arm: dict[str, str], seed: int) -> dict[str, float]:
    found = (0.3, 0.4, 0.95)[seed] if arm["layer"] == "window" else (0.92, 0.5, 0.94)[seed]
    size = {"state_bytes": 64 if arm["layer"] == "window" else 96, "state_bytes_memory": 64}
    return {"recall/accuracy": found, **size}


def report(root: Path) -> tuple[str, str]:
    screen = io.StringIO()
    compare(root, Console(file=screen, width=200))
    return (root / "report" / "report.md").read_text(), screen.getvalue()


def test_a_report_tells_what_else_differs(write_results: WriteResults) -> None:
    root = write_results(recall, axes=AXES, report=REPORT, models=MODELS)
    text, screen = report(root)
    section = text[text.index("## What else differs") : text.index("## Cells")]
    assert text.index("## Contrasts") < text.index("## What else differs")
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if "| " in line]
    assert table[0] == ["arm", "qk_norm", "state bytes", "seeds that reach 90%"]
    assert table[2:] == [
        ["window", "none", "64", "1/3"],
        ["memory", "l2", "96", "2/3"],
    ]
    assert "The learning rate is 0.01 for every arm, and tuned for none." in section
    fault = "memory - window: differ in qk_norm (l2 against none), which their options"
    sizes = "not equally large: at most state bytes 1.5 times (memory - window)"
    learned = "window: under half of the seeds reach 90%, and at least half do in arms that"
    for line in (fault, sizes, learned):
        assert f"**warning: {line}" in section.replace("arms that are compared are ", "")
        assert line in screen
    found = json.loads((root / "report" / "summary.json").read_text())["confounds"]
    assert found["facts"]["qk_norm"] == {"window": ["none"], "memory": ["l2"]}
    assert len(found["warnings"]) == 3


def test_a_window_arm_is_not_called_unlearned(write_results: WriteResults) -> None:
    root = write_results(
        recall, axes=AXES, report=REPORT, models=MODELS, window_arm={"layer": "window"}
    )
    assert "under half of the seeds" not in report(root)[0]


def test_cells_of_an_older_format_are_compared_by_what_they_hold(
    write_results: WriteResults,
) -> None:
    old = {
        "window": {"network": {"dim": 8, "layers": ["sliding"], "overrides": {0: {"window": 4}}}},
        "memory": {"network": {"layers": {"m": {"name": "gone", "heads": 2}}, "pattern": "m"}},
    }
    root = write_results(recall, axes=AXES, report=REPORT, models=old)
    section = report(root)[0]
    section = section[section.index("## What else differs") :]
    assert "model.network.pattern" in section and "model.network.overrides.0.window" in section
    assert "rotary" not in section


def test_nothing_is_compared_where_there_is_nothing(write_results: WriteResults) -> None:
    root = write_results(lambda arm, seed: None, axes=AXES, report=REPORT)
    assert "What else differs" not in report(root)[0]
    assert find_confounds({}, [("a", "b")], {}, {}, {}, False).table == [["arm"]]
