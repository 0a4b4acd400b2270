"""The grid file: its forms, its arms and cells, tuning, and errors that name the line."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from layerzoo import SpecError, get_layer
from layerzoo.ablations.cells import configs
from layerzoo.ablations.cells import grid as grids
from layerzoo.ablations.cells.cell import Seed
from layerzoo.ablations.cells.grid import Grid, load_grid, shipped_grids
from layerzoo.ablations.running.folder import METRICS, cell_state, prepare_folder
from layerzoo.data import MQAR
from layerzoo.layer import EXECUTION
from layerzoo.model import ModelConfig
from layerzoo.support.json_files import write_json
from layerzoo.support.yaml_files import config_path
from layerzoo.train.lit import LitModel

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
    assert grid.name == name and grid.source.question.endswith((".", "?"))
    assert len(grid.cells()) == len(grid.arms) * len(grid.seeds)
    if grid.source.sizes:
        assert grid.source.sizes == ["small", "full"] and len(grid.cells()) <= 60


FULL = [name for name, path in shipped_grids().items() if "\nsizes:" in path.read_text()]


@pytest.mark.parametrize(
    "name",
    [  # A cell takes 30 ms, and there are hundreds.
        pytest.param(n, marks=[] if n in ("quickstart", "length") else pytest.mark.slow)
        for n in FULL
    ],
)
def test_shipped_grids_build_in_full(name: str) -> None:
    assert load_grid(name, "full").name == f"{name}-full"


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
    b: &b {model.network.depth: 1, model.network.dim: 64}
    1e-2: {<<: [*a, *b], model.lr: 1}
"""
    grid = read(tmp_path, axes=axes)
    assert names(grid) == ["a", "b", "1e-2"]
    network = grid.cells()[2].config["model"]["network"]
    assert (network["layers"][0]["name"], network["dim"], network["depth"]) == ("linear", 16, 1)


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
    exclude = (
        "[{decay: none, model.network.dim: 32}, {layer: window, model.network.dim: [dim=16]}]"
    )
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


def test_an_error_in_a_base_names_its_file(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("modle: 1\n" + Path(config_path("mqar")).read_text())
    with pytest.raises(SpecError, match=re.escape(f"grid.yaml:2: base: {own}: modle: no such")):
        read(tmp_path, base="own.yaml")


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "ablations" / "README.md").read_text()
    example = tmp_path / "forgetting.yaml"
    example.write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    grid = load_grid(str(example))
    assert {name for name, value in grid.fields.to_fields().items() if not value} == set()


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

    monkeypatch.setattr(grids, "match_models", matched)
    match = "{by: parameters, to: {layer: window}}"
    own = '{trainer.default_root_dir: "of-${seed_everything}"}'
    grid = read(tmp_path, set=own, match=match, tune="{axes: {model.lr: [1, 2]}, seeds: [9]}")
    for cell in (*grid.cells(), *grid.tune_cells()):
        assert cell.config["model"]["network"]["dim"] == 24 and cell.matched == {"dim": 24}
    arms = {"window": {"layer": "window"}, "memory": {"layer": "memory"}}
    assert seen == [({"layer": "window"}, arms)]


TUNE = "{axes: {model.lr: [1e-3, 1e-2, 1e-1], warm: {a: {}, b: {model.warmup: 0}}}, seeds: [7, 8]}"


def test_tuning_runs_and_what_they_choose(tmp_path: Path) -> None:
    grid = read(tmp_path, tune=TUNE.replace("seeds", "budget: 50, seeds"), budget="90")
    runs = grid.tune_cells()
    assert len(runs) == 2 * 6 * 2 and len({cell.path for cell in runs}) == len(runs)
    assert runs[-1].path.startswith("tune/memory/lr=0.1,b/seed-8-")
    for cell in runs:
        assert cell.split == "val" and cell.config["trainer"]["max_steps"] == 50
        assert cell.config["model"]["lr"] == float(cell.tuned["model.lr"].removeprefix("lr="))

    def loss(cell: Any) -> dict[str, float | None] | str:
        arm, (lr, warm) = cell.arm, cell.tuned.values()
        if arm == "memory" and lr == "lr=0.1":  # the best of its seeds, but not of all
            return "failed: out of memory" if cell.seed.init == 7 else {"loss/held_out": 0.0}
        if arm == "memory" and lr == "lr=0.01":
            return {"loss/held_out": float("nan") if cell.seed.init == 7 else None}
        noise = 3.0 if cell.seed.init == 7 else -3.0  # larger than what tells options apart
        best = lr == "lr=0.01" and warm == "b"
        return {"loss/held_out": 5.0 + noise - best}

    figures = {cell.path: loss(cell) for cell in runs}
    choices = grid.choose(figures)
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
    nan = {n: "loss/held_out is nan" for n in ("7", "8")}
    lost = [{}, {}, nan, nan, *[{"7": "failed: out of memory"}] * 2]
    assert [trial.lost for trial in memory.trials] == lost
    cells = grid.cells(choices)
    assert [cell.tuned for cell in cells] == [window.best.options, memory.best.options] * 2
    assert [cell.config["model"]["lr"] for cell in cells] == [0.01, 0.001] * 2
    assert [cell.config["model"]["warmup"] for cell in cells] == [0, 0.05] * 2
    assert {cell.split for cell in cells} == {"test"}
    assert {cell.config["trainer"]["max_steps"] for cell in cells} == {90}


def test_arms_without_a_choice(tmp_path: Path) -> None:
    grid = read(tmp_path, tune=TUNE.replace("seeds", "metric: acc, mode: max, seeds"))
    window = [cell.path for cell in grid.tune_cells() if cell.arm == "window"]
    memory = [cell.path for cell in grid.tune_cells() if cell.arm == "memory"]
    figures: dict[str, Any] = {path: {"acc": n} for n, path in enumerate(window)}
    figures |= dict.fromkeys(memory, "diverged: loss nan at step 3")
    choices = grid.choose(figures)
    assert choices["memory"].best is None and len(choices["memory"].trials) == 6
    assert choices["window"].best is not None
    assert choices["window"].best.options == {"model.lr": "lr=0.1", "warm": "b"}
    assert {cell.arm for cell in grid.cells(choices)} == {"window"}
    del figures[memory[3]]  # has not ended
    assert grid.choose(figures).keys() == {"window"}
    figures[window[0]] = {"accu": 1.0}
    with pytest.raises(SpecError, match=r"tune.metric: tune/window/.* did you mean 'accu'"):
        grid.choose(figures)
    untuned = read(tmp_path)
    assert untuned.choose({}) == {} and len(untuned.cells({})) == 4


LAYERS = "model.network.layers"
MEMORY = f"{LAYERS}: [{{name: linear, heads: 2}}]"
TWO = f"""
  x: {{a: {{{MEMORY}}}, b: {{model.lr: 1}}}}
  y: {{c: {{}}, d: {{model.warmup: 0}}}}
"""
DATA = "{class_path: layerzoo.data.MQAR}"
MODEL = f"{{network: {{vocab_size: 8192, dim: 16, {MEMORY.removeprefix('model.network.')}}}}}"
CLAIM = "{arm: window, metric: m, value: 1, tolerance: 0, source: s}"

FORMS = [  # the line that holds <- is the one that the error names
    ({"seedz": "[1] # <-"}, "unknown field 'seedz'; did you mean 'seeds'?"),
    ({"name": "../escape # <-"}, "name: '../escape' is no folder name"),
    ({"name": ""}, "name: missing"),
    ({"seeds": "\n- 0\n- 0 # <-"}, "seeds.1: 0 is there already"),
    ({"seeds": "[-1] # <-"}, "seeds.0: must be whole and not negative, got -1"),
    ({"seeds": "[{init: 1, data: 1.5}] # <-"}, "seeds.0: must be whole and not negative"),
    (
        {"seeds": "\n- 0\n- {init: 1, dat: 2} # <-"},
        "seeds.1: expected init and data, got init, dat",
    ),
    ({"seeds": "\n- 0\n- {init: 1} # <-"}, "expected init and data, got init"),
    ({"seeds": "[] # <-"}, "seeds: needs at least one"),
    ({"budget": "0 # <-"}, "budget: must be at least 1, got 0"),
    ({"budget": "5", "set": "\n  trainer.max_steps: 5 # <-"}, "set.trainer.max_steps: budget"),
    ({"budget": "5", "axes": "\n  trainer.max_steps: [5] # <-"}, "budget sets it; drop one"),
    ({"set": "{seed_everything: 1} # <-"}, "set.seed_everything: the grid's seeds set it"),
    ({"set": "[a] # <-"}, "set: expected a mapping"),
    ({"axes": "{} # <-"}, "axes: needs at least one axis"),
    ({"axes": "\n  layer: a # <-"}, "axes.layer: expected options: label: {key: value}"),
    ({"axes": "\n  layer: {a: 3} # <-"}, "axes.layer.a: expected overrides"),
    ({"axes": "\n  layer:\n    a: {}\n    b/c: {} # <-"}, "'b/c' is no folder name"),
    ({"axes": "\n  layer: {..: {}} # <-"}, "'..' is no folder name"),
    (
        {"axes": "\n  model.lr:\n  - 1\n  - {a: 1} # <-"},
        "axes.model.lr.1: a list of options is of",
    ),
    ({"axes": "\n  model.lr: [1, 1] # <-"}, "'lr=1' is an option already"),
    ({"axes": "\n  model.lr: [] # <-"}, "at least one value"),
    ({"axes": "\n  model.x: [a/b] # <-"}, "'x=a/b' is no folder name"),
    ({"axes": "\n  s:\n    model.lr: [1, 2]\n    a.b: [1] # <-"}, "expected 2 values, as many as"),
    ({"axes": "\n  x:\n    a: {}\n  x: # <-\n    b: {}"}, "found duplicate key x"),
    ({"axes": "\n  x:\n    a: {m: 1, m: 2} # <-"}, "found duplicate key m"),
    ({"axes": "\n  x: {a: {}", "seeds": "[0] # <-"}, "did not find"),
    ({"set": "{model.lr: '${'}"}, "'${'"),
]

ARMS = [
    ({"design": "factorial # <-"}, "design: expected one of 'product', 'one_at_a_time'"),
    ({"axes": TWO, "when": "{z: {x: a}} # <-"}, "when.z: no such axis; known: x, y"),
    ({"axes": TWO, "when": "\n  y: {w: a} # <-"}, "when.y.w: no such axis"),
    ({"axes": TWO, "when": "{y: {x: [a, aa]}} # <-"}, "when.y.x.1: no option 'aa'; did you mean"),
    ({"axes": TWO, "when": "{x: {y: c}} # <-"}, "when.x.y: list axis y before axis x"),
    ({"axes": TWO, "when": "{y: a} # <-"}, "when.y: expected axis: option, got 'a'"),
    (
        {
            "axes": f"{TWO}  z:\n    e: {{}} # <-\n",
            "when": "{y: {x: b}, z: {x: a, y: c}}",
        },
        "axes.z.e: in no arm: when leaves it out",
    ),
    (
        {
            "axes": "\n  x: {a: {}, b: {}}\n  y:\n    c: {}\n    d: {} # <-",
            "when": "{y: {x: b}}",
            "design": "one_at_a_time",
        },
        "axes.y.d: in no arm: design: one_at_a_time leaves it out",
    ),
    (
        {"axes": "\n  x:\n    a: {}\n    b: {} # <-", "exclude": "[{x: b}]"},
        "axes.x.b: in no arm: exclude leaves it out",
    ),
    ({"axes": TWO, "exclude": "\n- {x: a, y: c}\n- {x: e} # <-"}, "exclude.1.x: no option 'e'"),
    (
        {"axes": TWO, "when": "{y: {x: a}}", "exclude": "\n- {x: b, y: c} # <-"},
        "exclude.0: matches no arm",
    ),
    ({"axes": TWO, "exclude": "{x: a} # <-"}, "exclude: expected a list of a mapping"),
    ({"axes": f"# <-\n  x: {{{'a' * 201}: {{}}}}"}, "is too long for a folder"),
    (
        {"axes": "\n  x:\n    a: {}\n    b: {} # <-"},
        "axes.x.b: arm b is the same run as a; drop one",
    ),
]

CONFIGS = [
    ({"set": "{trainer.devices: 2} # <-"}, "trainer.devices: 2, but a cell runs on one device"),
    *(
        ({"set": f"{{{option}}} # <-"}, message)
        for option, message in {
            "trainer: 3": "trainer: expected a mapping of options, got 3",
            "trainer: null": "trainer: expected a mapping of options, got None",
            "data.init_args: [1, 2]": "data.init_args: expected a mapping of options, got [1, 2]",
            "trainer.limit_val_batches: []": "trainer.limit_val_batches: expected int or float",
            "trainer.limit_val_batches: .nan": "limit_val_batches: must be finite, got nan",
            "trainer.limit_val_batches: -0.5": "or a share of them, a float in [0, 1]; got -0.5",
            "trainer.limit_test_batches: 1.5": "or a share of them, a float in [0, 1]; got 1.5",
            "trainer.val_check_interval: 0": "must be a number of batches, 1 or more, or a share",
            "trainer.accumulate_grad_batches: 0": "must be at least 1, got 0",
            "trainer.max_epochs: -2": "trainer.max_epochs: must be at least -1, got -2",
            "trainer.max_epochs: many": "trainer.max_epochs: expected int or null, got many",
            "model.lr: .inf": "model.lr: must be finite, got inf",
            "model.betas: [0.9, 1.5]": "model.betas: must be in [0, 0.999999999], got 1.5",
            "model.warmup: long": "model.warmup: expected float, got long",
            "model.network.mlp: .inf": "mlp: must be finite, got inf",
        }.items()
    ),
    ({"base": "mqarr # <-"}, "base: --config mqarr: no such file or shipped config; did you mean"),
    ({"base": "\n  model: {}\n  data: MQAR # <-"}, "base: data: write it as class_path"),
    (
        {"base": f"\n  data: {DATA}\n  model: {MODEL}\n  modle: 1 # <-"},
        "base: modle: no such section; did you mean 'model'?",
    ),
    (
        {
            "base": f"\n  data: {DATA}\n  model: {{lr: 1}} # <-",
            "axes": "{model.lr: [1]}",
        },
        "base: model.network: expected the fields",
    ),
    ({"set": "\n  modle.lr: 1 # <-"}, "no 'modle'; did you mean 'model'?"),
    ({"set": "\n  model.lrr: 1 # <-"}, "model.lrr: no such option; did you mean 'lr'?"),
    ({"set": f"\n  {LAYERS}.0: linear # <-"}, f"set.{LAYERS}.0: {LAYERS} is a list; set all"),
    ({"set": "\n  model.network.dim: 8\n  model.network.conv: ${data.no} # <-"}, "not found"),
    ({"set": "{data.init_args.pairs: 99} # <-"}, "pairs: 99"),
    ({"set": "{data.init_args.pars: 4} # <-"}, "no such option; did you mean 'pairs'?"),
    ({"set": "{model.network.vocab_size: 8} # <-"}, "beyond the model's vocabulary of 8"),
    ({"axes": "\n  lr: [1, 2] # <-"}, "axes.lr.0: lr: no such section"),
    (
        {"axes": f"\n  x:\n    a: {{{MEMORY}}}\n    b:\n      {LAYERS}: [linaer] # <-"},
        f"axes.x.b.{LAYERS}: model.network: layers[0]: unknown layer 'linaer'; did you mean",
    ),
    # Neither is wrong without the other: the later one is named.
    (
        {"axes": f"\n  x: {{a: {{{MEMORY}}}}}\n  model.network.dim:\n  - 8\n  - 3 # <-"},
        "axes.model.network.dim.1: model.network: layers[0]: linear: heads",
    ),
    ({"window_arm": "{layer: windo} # <-"}, "no option 'windo'; did you mean 'window'?"),
    (
        {"window_arm": "{layr: window} # <-"},
        "window_arm.layr: no such axis; did you mean 'layer'?",
    ),
    ({"window_arm": "{layer: memory} # <-"}, "window_arm: this arm's reach is unbounded"),
    (
        {"axes": LAYER + "  model.network.conv: [0, 3]", "window_arm": "{layer: window} # <-"},
        "its arms differ in reach (window,conv=0; window,conv=3)",
    ),
    (
        {"base": "parity", "window_arm": "{layer: window} # <-"},
        "window_arm: data: reach: no such option",
    ),
]

PARTS = [
    ({"match": "{by: params, to: window} # <-"}, "match: by: expected one of 'parameters'"),
    ({"match": "{by: parameters, to: {layer: windo}} # <-"}, "match.to.layer: no option 'windo'"),
    (
        {"tune": "{axes: {model.network.dim: [16]}, seeds: [9]} # <-"}
        | {"match": "{by: parameters, to: window}"},
        "tune.axes.model.network.dim.0: a network that is matched is not tuned",
    ),
    (
        {"tune": "{axes: {model.lr: [1]}, seeds: [0]} # <-"},
        "tune.seeds.0: 0: the grid's seeds have",
    ),
    (
        {"tune": "{axes: {model.lr: [1]}, seeds: [9, {init: 10, data: 1}]} # <-"},
        "tune.seeds.1: 10-data-1: the grid's seeds have its data too",
    ),
    ({"tune": "{axes: {model.lr: [1]}, seeds: [9], budget: 0} # <-"}, "tune: budget: must be"),
    ({"tune": "{axes: {layer: {a: {}}}, seeds: [9]} # <-"}, "layer: is an axis of the grid"),
    ({"tune": "{axes: {model.lr: [1]}, sedes: [9]} # <-"}, "tune: unknown field 'sedes'; did you"),
    (
        {"tune": "{axes: {trainer.max_steps: [1]}, seeds: [9], budget: 1} # <-"},
        "tune.axes.trainer.max_steps.0: budget sets it",
    ),
    ({"tune": "\n  axes:\n    model.lrr: [1] # <-\n  seeds: [9]"}, "did you mean 'lr'?"),
    (
        {"axes": "\n  lr:\n    low: {model.lr: 1}\n    high: {model.lr: 2} # <-"}
        | {"tune": "{axes: {model.lr: [3]}, seeds: [9]}"},
        "arm high is the same run as low, both with lr=3",
    ),
    ({"report": "{by: [layr]} # <-"}, "report.by.0: no such axis; did you mean 'layer'?"),
    ({"report": "{metrik: a} # <-"}, "report: unknown field 'metrik'; did you mean 'metric'?"),
    ({"report": "{contrasts: [[window, memry]]} # <-"}, "no arm 'memry'; did you mean 'memory'?"),
    ({"report": "{contrasts: [[window]]} # <-"}, "report.contrasts.0: expected two arms"),
    (
        {"expect": f"\n- {CLAIM}\n- {CLAIM.replace('window', 'windo')} # <-"},
        "expect.1: arm: no 'w",
    ),
    (
        {"expect": "\n- arm: window\n  metric: m\n  tolerence: 0 # <-\n  value: 1"},
        "expect.0: unknown field 'tolerence'; did you mean 'tolerance'?",
    ),
    (
        {"expect": f"\n- {CLAIM.replace('value: 1', 'value: bound')} # <-"},
        "expect.0: value: expected float or one of 'window_bound'",
    ),
    ({"expect": f"\n- {CLAIM.replace('0', '-0.1')} # <-"}, "tolerance: must not be negative"),
    ({"expect": f"{CLAIM} # <-"}, "expect: expected"),
    (
        {"expect": f"\n- {CLAIM.replace('s}', 's, minus: memry}')} # <-"},
        "expect.0: minus: no 'memry'; did you mean 'memory'?",
    ),
    ({"expect": f"\n- {CLAIM.replace('s}', 's, minus: window}')} # <-"}, "is the arm itself"),
    (
        {"expect": f"\n- {CLAIM.replace('0', 'sign')} # <-"},
        "expect.0: tolerance: sign is of a difference; name an arm in minus",
    ),
    (
        {"expect": f"\n- {CLAIM.replace('0', 'sign, minus: memory').replace('1', '0')} # <-"},
        "expect.0: value: 0 has no sign",
    ),
    (
        {"expect": f"\n- {CLAIM.replace('1', 'window_bound, minus: memory')} # <-"},
        "expect.0: value: window_bound is of one arm",
    ),
    ({"expect": f"\n- {CLAIM.replace('0', 'sing')} # <-"}, "expected float or one of 'sign'"),
    ({"minutes": "0 # <-"}, "minutes: must be positive, got 0"),
]


@pytest.mark.parametrize(("fields", "message"), [*FORMS, *ARMS, *CONFIGS, *PARTS])
def test_a_wrong_grid_is_refused_at_its_line(
    tmp_path: Path, refused: Any, fields: dict[str, str], message: str
) -> None:
    with refused(message):
        read(tmp_path, **fields)


def test_a_number_that_is_written_as_text_is_a_number(tmp_path: Path) -> None:
    """As it is where a cell is trained."""
    assert (
        read(tmp_path, set='{trainer.max_epochs: "3"}').cells()[0].config["trainer"]
        == (read(tmp_path, set="{trainer.max_epochs: 3}").cells()[0].config["trainer"])
    )


@pytest.mark.parametrize("owner", ["layer", "module"])
def test_cells_of_another_default_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    """Cells from when a default was another stand beside those of now, which have yet to run."""
    with monkeypatch.context() as then:
        if owner == "layer":
            start = get_layer("sliding").Config.__init__
            then.setattr(start, "__kwdefaults__", start.__kwdefaults__ | {"qk_norm": "none"})
        else:
            (warmup,) = (f for f in LitModel.Config.fields() if f.name == "warmup")
            then.setattr(warmup, "default", 0.5)
        before = read(tmp_path).cells()
    for cell in before:
        write_json(prepare_folder(cell, tmp_path) / METRICS, {"recall/accuracy": 1.0})
    changed = {"layer": {"window"}, "module": {"window", "memory"}}[owner]
    for cell, old in zip(read(tmp_path).cells(), before, strict=True):
        assert (cell.identity != old.identity) == (cell.arm in changed)
        assert cell_state(tmp_path / cell.path) == (
            "pending" if cell.arm in changed else "finished"
        )
    if owner == "layer":  # and the old ones still hold what they were
        network = before[0].config["model"]["network"]
        assert network["layers"][0]["qk_norm"] == "none"
        assert ModelConfig.from_fields(network).to_fields() == network


def test_a_cell_holds_every_option(tmp_path: Path) -> None:
    cell = read(tmp_path).cells()[0]
    module, task = ({*signature(cls).parameters} for cls in (LitModel, MQAR))
    assert {*cell.config["model"]} == module - {*EXECUTION}
    assert {*cell.config["data"]["init_args"]} == task
    assert cell.config["model"]["network"] == configs.model_of(cell.config).config.to_fields()
