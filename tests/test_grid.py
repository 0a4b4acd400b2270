"""The grid file: its forms, its arms and cells, tuning, and errors that name the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from layerzoo import SpecError
from layerzoo.ablations import grid as grids
from layerzoo.ablations.cell import Seed
from layerzoo.ablations.grid import Grid, load_grid, shipped_grids
from layerzoo.ablations.tune import choose

LAYER = """
  layer:
    window: {model.network.layers: [{name: sliding, heads: 2, window: 8}]}
    memory: {model.network.layers: [{name: linear, heads: 2}]}
"""
DIM = """
  model.network.dim: [16, 32]
"""
FIELDS = {"name": "tiny", "base": "mqar", "axes": LAYER, "seeds": "[0, 1]"}


def read(folder: Path, **fields: str) -> Grid:
    """A grid from the YAML of its fields; "" drops one."""
    path = folder / "grid.yaml"
    text = "".join(f"{name}: {value}\n" for name, value in {**FIELDS, **fields}.items() if value)
    path.write_text(text)
    return load_grid(str(path))


def names(grid: Grid) -> list[str]:
    return [",".join(arm.values()) for arm in grid.arms]


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("name", shipped_grids())
def test_shipped_grids_build(name: str) -> None:
    grid = load_grid(name)
    assert grid.name == name and grid.text == grid.path.read_text()
    assert len(grid.cells()) == len(grid.arms) * len(grid.seeds)


def test_cells_are_paired_and_share_one_ceiling(tmp_path: Path) -> None:
    seeds, dim = "[0, {init: 1, data: 11}]", "{model.network.dim: 16}"
    grid = read(tmp_path, seeds=seeds, set=dim, window_arm="{layer: window}")
    cells = grid.cells()
    assert [(cell.arm, cell.seed) for cell in cells] == [
        (arm, seed) for seed in (Seed(0, 0), Seed(1, 11)) for arm in ("window", "memory")
    ]
    for cell in cells:
        assert cell.config["seed_everything"] == cell.seed.init
        data = cell.config["data"]["init_args"]
        assert data["seed"] == cell.seed.data
        assert (data["reach"], data["sinks"]) == (2 * 7 + 2 * 2, 0)  # of the window arm, for all
        assert cell.config["model"]["network"]["dim"] == 16
        assert cell.config["model"]["network"]["vocab_size"] == 64  # resolved
    layers = [cell.config["model"]["network"]["layers"][0]["name"] for cell in cells]
    assert layers == ["sliding", "linear"] * 2
    assert cells[3].path.startswith("memory/seed-1-data-11-")
    assert len({cell.identity for cell in cells}) == 4


def test_every_form_of_an_axis(tmp_path: Path) -> None:
    axes = """
  conv:
    on: {model.network.conv: 3}
    off: {model.network.conv: 0}
  model.lr: [1e-3, 3e-3]
  size: {model.network.dim: [32, 64], model.network.depth: [1, 2]}
  train: {data.init_args.train_samples: [1000]}
"""
    grid = read(tmp_path, axes=axes, seeds="[3]")
    assert names(grid) == [
        f"{conv},lr={lr},size={size},train=1000"
        for conv in ("on", "off")
        for lr in ("0.001", "0.003")
        for size in (32, 64)
    ]
    cell = grid.cells()[-1]
    keys = ("model.network.conv", "model.lr", "model.network.dim", "model.network.depth")
    assert [at(cell.config, key) for key in keys] == [0, 0.003, 64, 2]
    assert at(cell.config, "data.init_args.train_samples") == 1000


def test_an_option_merged_from_an_anchor(tmp_path: Path) -> None:
    axes = """
  layer:
    a: &a {model.network.layers: [linear], model.network.dim: 16}
    1e-2: {<<: *a, model.network.dim: 32}
"""
    grid = read(tmp_path, axes=axes)
    assert names(grid) == ["a", "1e-2"]
    assert [cell.config["model"]["network"]["dim"] for cell in grid.cells()[:2]] == [16, 32]


THREE = (
    LAYER
    + """
  decay:
    none: {}
    constant: {model.network.layers: [{name: linear, heads: 2, decay: constant}]}
"""
    + DIM
)


def test_conditions_exclusions_and_design(tmp_path: Path) -> None:
    when = "{decay: {layer: [memory]}}"
    assert names(read(tmp_path, axes=THREE, when=when)) == [
        *("window,dim=16", "window,dim=32"),
        *("memory,none,dim=16", "memory,none,dim=32"),
        *("memory,constant,dim=16", "memory,constant,dim=32"),
    ]
    # An option of a list is named by its label or its value.
    exclude = "[{decay: none, model.network.dim: 32}, {layer: window, model.network.dim: [dim=16]}]"
    assert names(read(tmp_path, axes=THREE, when=when, exclude=exclude)) == [
        *("window,dim=32", "memory,none,dim=16", "memory,constant,dim=16"),
        "memory,constant,dim=32",
    ]
    # One axis at a time from the baseline, memory,none,dim=16.
    window, memory = LAYER.splitlines()[2:]
    turned = THREE.replace(f"{window}\n{memory}", f"{memory}\n{window}")
    assert names(read(tmp_path, axes=turned, when=when, design="one_at_a_time")) == [
        *("memory,none,dim=16", "memory,none,dim=32", "memory,constant,dim=16", "window,dim=16")
    ]


def test_the_base_may_be_a_file_beside_or_in_the_grid(tmp_path: Path) -> None:
    base = """
  trainer: {max_steps: 7}
  model: {network: {vocab_size: "${data.init_args.vocab_size}", dim: 16, layers: [linear]}}
  data: {class_path: layerzoo.data.MQAR}
"""
    inline = read(tmp_path, base=base)
    (tmp_path / "own.yaml").write_text(re.sub("(?m)^  ", "", base))
    beside = read(tmp_path, base="own.yaml")
    configs = [[cell.config for cell in grid.cells()] for grid in (inline, beside)]
    assert configs[0] == configs[1]
    assert configs[0][0]["model"]["network"]["vocab_size"] == 8192  # the task's default
    # A task whose base gives no options takes overrides.
    length = "{data.init_args.length: 128}"
    cell, *_ = read(tmp_path, base="own.yaml", set=length).cells()
    assert cell.config["data"]["init_args"]["length"] == 128


def test_a_budget_is_of_updates_and_validates_in_it(tmp_path: Path) -> None:
    def trainer(**fields: str) -> tuple[int, int]:
        trainer = read(tmp_path, **fields).cells()[0].config["trainer"]
        return trainer["max_steps"], trainer["val_check_interval"]

    assert trainer() == (400, 100)
    assert trainer(budget="250") == (250, 100)
    assert trainer(budget="30") == (30, 30)
    assert trainer(budget="30", set="{trainer.val_check_interval: 10}") == (30, 10)


def test_a_config_may_refer_to_the_seeds(tmp_path: Path) -> None:
    own = '{trainer.default_root_dir: "runs/${seed_everything}/${data.init_args.seed}"}'
    cells = read(tmp_path, seeds="[4, {init: 5, data: 6}]", set=own).cells()
    folders = [cell.config["trainer"]["default_root_dir"] for cell in cells]
    assert folders == ["runs/4/4"] * 2 + ["runs/5/6"] * 2


def test_the_matched_network_is_of_all_seeds(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []

    def matched(match: Any, configs: Any, arms: Any) -> Any:
        seen.append((match.to, arms))
        out = {}
        for arm, config in configs.items():
            model = {**config["model"], "network": {**config["model"]["network"], "dim": 24}}
            out[arm] = {**config, "model": model}, {"dim": 24}
        return out

    monkeypatch.setattr(grids, "matched", matched)
    match = "{by: parameters, to: {layer: window}}"
    grid = read(tmp_path, match=match, tune="{axes: {model.lr: [1, 2]}, seeds: [9]}")
    for cell in (*grid.cells(), *grid.tune_cells()):
        assert cell.config["model"]["network"]["dim"] == 24 and cell.matched == {"dim": 24}
    arms = {"window": {"layer": "window"}, "memory": {"layer": "memory"}}
    assert seen == [({"layer": "window"}, arms)] * 3  # as reported, and with each rate


TUNE = "{axes: {model.lr: [1e-3, 1e-2, 1e-1], warm: {a: {}, b: {model.warmup: 0}}}, seeds: [7, 8]}"


def test_tuning_runs_and_what_they_choose(tmp_path: Path) -> None:
    grid = read(tmp_path, tune=TUNE.replace("seeds", "budget: 50, seeds"), budget="90")
    runs = grid.tune_cells()
    assert len(runs) == 2 * 6 * 2 and len({cell.path for cell in runs}) == len(runs)
    assert runs[-1].path.startswith("tune/memory/lr=0.1,b/seed-8-")
    for cell in runs:
        assert cell.split == "val" and cell.config["trainer"]["max_steps"] == 50
        assert cell.config["model"]["lr"] == float(cell.tuned["model.lr"].removeprefix("lr="))

    def loss(cell: Any) -> dict[str, float] | None:
        arm, (lr, warm) = cell.arm, cell.tuned.values()
        if arm == "memory" and lr == "lr=0.1":  # the best of its seeds, but not of all
            return None if cell.seed.init == 7 else {"loss/held_out": 0.0}
        if arm == "memory" and lr == "lr=0.01":
            return {"loss/held_out": float("nan")}
        noise = 3.0 if cell.seed.init == 7 else -3.0  # larger than what tells options apart
        best = lr == "lr=0.01" and warm == "b"
        return {"loss/held_out": 5.0 + noise - best}

    figures = {cell.path: loss(cell) for cell in runs}
    choices = choose(grid, figures)
    window, memory = (choices[arm] for arm in ("window", "memory"))
    assert window.best is not None and memory.best is not None
    assert window.best.options == {"model.lr": "lr=0.01", "warm": "b"}
    assert (window.best.mean, window.best.seeds, window.edges) == (4.0, 2, ())
    # Equals: the first listed. It is at the edge of the rates, and `warm` has no numbers.
    assert memory.best.options == {"model.lr": "lr=0.001", "warm": "a"}
    assert memory.edges == ("model.lr",)
    assert [(trial.mean, trial.seeds) for trial in memory.trials] == [
        *[(5.0, 2)] * 2,
        *[(None, 0)] * 2,
        *[(0.0, 1)] * 2,
    ]
    cells = grid.cells(choices)
    assert [cell.tuned for cell in cells] == [window.best.options, memory.best.options] * 2
    assert [cell.config["model"]["lr"] for cell in cells] == [0.01, 0.001] * 2
    assert [cell.config["model"].get("warmup") for cell in cells] == [0, None] * 2
    assert {cell.split for cell in cells} == {"test"}
    assert {cell.config["trainer"]["max_steps"] for cell in cells} == {90}


def test_arms_without_a_choice(tmp_path: Path) -> None:
    grid = read(tmp_path, tune=TUNE.replace("seeds", "metric: acc, mode: max, seeds"))
    window = [cell.path for cell in grid.tune_cells() if cell.arm == "window"]
    memory = [cell.path for cell in grid.tune_cells() if cell.arm == "memory"]
    figures: dict[str, Any] = {path: {"acc": n} for n, path in enumerate(window)}
    figures |= dict.fromkeys(memory)  # all diverged
    choices = choose(grid, figures)
    assert choices["memory"].best is None and len(choices["memory"].trials) == 6
    assert choices["window"].best is not None
    assert choices["window"].best.options == {"model.lr": "lr=0.1", "warm": "b"}
    assert {cell.arm for cell in grid.cells(choices)} == {"window"}
    del figures[memory[3]]  # has not ended
    assert choose(grid, figures).keys() == {"window"}
    figures[window[0]] = {"accu": 1.0}
    with pytest.raises(SpecError, match=r"tune.metric: tune/window/.* did you mean 'accu'"):
        choose(grid, figures)
    untuned = read(tmp_path)
    assert choose(untuned, {}) == {} and len(untuned.cells({})) == 4


LAYERS = "model.network.layers"
MEMORY = f"{{{LAYERS}: [{{name: linear, heads: 2}}]}}"


# The line that holds <- is the one that the error names.
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seedz": "[1] # <-"}, "unknown field 'seedz'; did you mean 'seeds'?"),
        ({"name": "../escape # <-"}, "name: '../escape' is no folder name"),
        ({"base": "mqarr # <-"}, "base: --config mqarr: no such file or shipped config; did you"),
        ({"base": "\n  model: {}\n  data: MQAR # <-"}, "base: data: write it as class_path"),
        (
            {"base": "\n  data: {class_path: layerzoo.data.MQAR}\n  modle: {} # <-"},
            "base: modle: no such section; did you mean 'model'?",
        ),
        ({"design": "factorial # <-"}, "design: expected one of 'product', 'one_at_a_time'"),
        ({"seeds": "\n- 0\n- 0 # <-"}, "seeds.1: 0 is there already"),
        ({"seeds": "[-1] # <-"}, "seeds.0: must be whole and not negative, got -1"),
        ({"seeds": "\n- 0\n- {init: 1, dat: 2} # <-"}, "expected init and data, got init, dat"),
        ({"seeds": "[] # <-"}, "seeds: needs at least one"),
        ({"budget": "0 # <-"}, "budget: must be at least 1, got 0"),
        ({"budget": "5", "set": "\n  trainer.max_steps: 5 # <-"}, "set.trainer.max_steps: budget"),
        ({"budget": "5", "axes": "\n  trainer.max_steps: [5] # <-"}, "budget sets it"),
        ({"set": "{seed_everything: 1} # <-"}, "set.seed_everything: the grid's seeds set it"),
        ({"set": "\n  modle.lr: 1 # <-"}, "no 'modle'; did you mean 'model'?"),
        ({"set": "\n  model.lrr: 1 # <-"}, "model.lrr: no such option; did you mean 'lr'?"),
        ({"set": f"\n  {LAYERS}.0: linear # <-"}, "is a list; set all of it"),
        ({"set": "\n  model.network.dim: 7\n  model.network.conv: ${data.no} # <-"}, "not found"),
        ({"set": "{data.init_args.pairs: 99} # <-"}, "pairs: 99"),
        ({"set": "{data.init_args.pars: 4} # <-"}, "no such option; did you mean 'pairs'?"),
        ({"set": "{model.network.vocab_size: 8} # <-"}, "beyond the model's vocabulary of 8"),
        ({"axes": "{} # <-"}, "axes: needs at least one axis"),
        ({"axes": "\n  layer: a # <-"}, "axes.layer: expected options: label: {key: value}"),
        ({"axes": "\n  layer: {a: 3} # <-"}, "axes.layer.a: expected overrides"),
        ({"axes": "\n  layer:\n    a: {}\n    b/c: {} # <-"}, "'b/c' is no folder name"),
        ({"axes": "\n  layer: {..: {}} # <-"}, "'..' is no folder name"),
        ({"axes": "\n  lr: [1]\n  model.lr: # <-\n  - {a: 1}"}, "name each option"),
        ({"axes": "\n  model.lr: [1, 1] # <-"}, "'lr=1' is an option already"),
        ({"axes": "\n  model.lr: [] # <-"}, "at least one value"),
        ({"axes": "\n  model.x: [a/b] # <-"}, "'x=a/b' is no folder name"),
        ({"axes": "\n  s:\n    model.lr: [1, 2]\n    a.b: [1] # <-"}, "expected 2 values, as many"),
        ({"axes": "\n  lr: [1, 2] # <-"}, "axes.lr.0: lr: no such section"),
        (
            {"axes": f"\n  x:\n    a: {MEMORY}\n    b:\n      {LAYERS}: [linaer] # <-"},
            f"axes.x.b.{LAYERS}: model.network: no layer 'linaer'; did you mean 'linear'?",
        ),
        ({"axes": f"\n  x: {{a: {MEMORY}}}\n  model.network.dim: [8, 3] # <-"}, "divide 3"),
        (
            {"axes": "\n  x: {a: {}, b: {model.lr: 1}}\n  model.lr: [2, 3]\n#"},
            "arm b,lr=2 is the same run as a,lr=2",
        ),
        ({"axes": "\n  x: # <-\n    a: {}\n  x:\n    b: {}"}, "found duplicate key x"),
        ({"axes": "\n  x: {a: {}, b: [1] # <-"}, "did not find"),
        (
            {"axes": "\n  a: {x: {}, y: {model.lr: 1}}\n  b: {z: {}}", "when": "{b: {a: x}}"},
            "",
        ),
    ],
)
def test_a_wrong_field_is_refused_at_its_line(
    tmp_path: Path, fields: dict[str, str], message: str
) -> None:
    pass
