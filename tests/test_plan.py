"""Planning: what a grid would do and cost, before it does it."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from omegaconf import OmegaConf
from rich.console import Console

from layerzoo.ablations.cells import configs, sizes
from layerzoo.ablations.cells.cell import Cell, Seed
from layerzoo.ablations.planning import cautions as cautions_module
from layerzoo.ablations.planning import probe
from layerzoo.ablations.planning.cautions import cautions
from layerzoo.ablations.planning.plan import (
    CELL_SECONDS,
    PROCESS_SECONDS,
    make_plan,
    makespan,
    plan_command,
    show_plan,
)
from layerzoo.ablations.planning.probe import Speed, probe_speeds, training_shape
from layerzoo.ablations.planning.work import work_of
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.spec import SpecError
from layerzoo.train.command import quiet
from layerzoo.train.lit import LitModel

OWN = {"vocab_size": 16, "length": 16, "pairs": 2}
MQAR = {"class_path": "layerzoo.data.MQAR"}
NETWORK = {"vocab_size": 16, "dim": 8, "depth": 1, "layers": [{"name": "linear", "heads": 2}]}


def cell(arm: str = "a", seed: int = 0, **changes: Any) -> Cell:
    """A small one, with changes of the sections of its config."""
    model = {"lr": 0.01, **changes.pop("model", {})}
    model["network"] = NETWORK | changes.pop("network", {})
    tree: dict[str, Any] = {
        "seed_everything": seed,
        "trainer": {"max_steps": 10, **changes.pop("trainer", {})},
        "model": model,
        "data": {**MQAR, "init_args": {**OWN, "batch_size": 4, "seed": seed}},
    }
    tree["data"]["init_args"] |= changes.pop("data", {})
    return Cell({"layer": arm}, Seed(seed, seed), tree, **changes)


class Count(Callback):
    """What Lightning really does."""

    def __init__(self) -> None:
        self.held_out, self.tokens = Counter[int](), 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.tokens += args[2]["tokens"].numel()

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.held_out[args[2]["tokens"].shape[1]] += 1

    on_test_batch_end = on_validation_batch_end


PHASES = {
    "tasks": [
        {"class_path": "layerzoo.data.MQAR", "init_args": {**OWN, "length": length}}
        for length in (16, 24)
    ],
    "updates": 3,
}
COUNTED = {"train_samples": 27, "val_samples": 10, "test_samples": 6}


@pytest.mark.parametrize(
    ("trainer", "data"),
    [
        ({"max_steps": 20, "val_check_interval": 7, "check_val_every_n_epoch": None}, {}),
        ({"max_steps": 14, "limit_val_batches": 2, "num_sanity_val_steps": -1}, {}),
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "limit_train_batches": 5}, {}),
        ({"max_steps": 5, "accumulate_grad_batches": 4, "val_check_interval": 0.4}, {}),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2, "val_check_interval": 4}, {}),
        ({"max_steps": 15, "check_val_every_n_epoch": 2, "val_check_interval": 2}, {}),
        ({"max_steps": 9, "check_val_every_n_epoch": 2, "val_check_interval": 2}, {}),
        ({"max_epochs": 2, "max_steps": 99, "limit_test_batches": 0.5}, {"test_samples": 25}),
        ({"max_steps": 3, "num_sanity_val_steps": 1}, {"lengths": [16, 24]}),
        ({"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}, PHASES),
        ({"max_steps": 3, "num_sanity_val_steps": None}, {}),
        ({"max_steps": 3, "limit_val_batches": 0}, {}),
        ({"max_steps": 0}, {}),
        ({"max_epochs": 0}, {}),
        ({"max_steps": 3, "limit_train_batches": 0}, {}),
    ],
)
def test_work_is_what_lightning_does(trainer: Any, data: Any, tmp_path: Path) -> None:
    """Of a tuning run where validation is of some batches, and else of a reported one."""
    quiet()
    split = "val" if "limit_val_batches" in trainer or "lengths" in data else "test"
    one = cell(trainer={"max_steps": -1, **trainer}, data=COUNTED | data, split=split)
    if data is PHASES:
        options = {"batch_size": 4, **COUNTED, **PHASES}
        one.config["data"] = {"class_path": "layerzoo.data.Continual", "init_args": options}
    found, count = work_of(one), Count()
    fields = dict(one.config["model"])
    model = LitModel(network=ModelConfig.from_fields(fields.pop("network")), **fields)
    bare = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning = Trainer(
        **one.config["trainer"],
        **bare,
        enable_checkpointing=False,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[count],
    )
    task = configs.task_of(one.config).varied()
    lightning.fit(model, task)
    measure: Any = lightning.test if split == "test" else lightning.validate
    measure(model, task, verbose=False)
    assert found.updates == lightning.global_step
    assert sum(found.tokens.values()) == pytest.approx(count.tokens)
    assert {T: n for T, n in found.held_out.items() if n} == count.held_out


def test_training_without_an_end_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^a: trainer: training has no end; set max_steps$"):
        make_plan("g", [cell(trainer={"max_steps": -1, "max_epochs": -1})], probe=False)


def test_validation_by_the_clock_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^a: trainer.val_check_interval: 00:00:15:00, but a"):
        make_plan("g", [cell(trainer={"val_check_interval": "00:00:15:00"})], probe=False)


def test_sizes_and_totals() -> None:
    wide = {"dim": 16}
    cells = [
        cell(arm, seed, network=wide if arm == "b" else {}) for seed in (0, 1, 2) for arm in "ab"
    ]
    tuning = [
        cell(
            "a", 9, split="val", tuned={"lr": f"{lr}"}, model={"lr": lr}, trainer={"max_steps": 4}
        )
        for lr in (0.1, 0.2)
    ]
    cells[0].matched["deviation"] = -0.03
    found = make_plan("g", cells, tuning, probe=False, jobs=2)
    assert [(row.arm, row.tuning, row.cells, row.updates) for row in found.rows] == [
        ("a", True, 2, 4),
        ("a", False, 3, 10),
        ("b", False, 3, 10),
    ]
    row = found.rows[2]
    model = LanguageModel(**{**NETWORK, **wide})
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.flops_per_token == model.flops_per_token(16)
    assert row.state_bytes == model.state_bytes(16).total
    assert row.training_flops == 3 * 3 * 10 * 4 * 16 * model.flops_per_token(16)
    assert found.rows[1].deviation == -0.03 and row.deviation is None
    assert (found.cells, found.updates, found.seconds) == (8, 68, None)
    assert found.training_flops == sum(row.training_flops for row in found.rows)


def test_sizes_that_tuning_changes_are_not_shown() -> None:
    tuning = [cell(split="val", tuned={"d": f"{d}"}, network={"dim": d}) for d in (8, 16)]
    (row,) = make_plan("g", [], tuning, probe=False).rows
    assert row.parameters is None and row.cells == 2
    each = [make_plan("g", [], [one], probe=False).training_flops for one in tuning]
    assert row.training_flops == sum(each)


def test_a_large_grid_is_planned_by_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Counter[str]()
    build = configs.model_of

    def counted(tree: Any) -> Any:
        built[json.dumps(tree["model"]["network"])] += 1
        return build(tree)

    monkeypatch.setattr(configs, "model_of", counted)
    sizes._cached_sizes.cache_clear()
    cautions_module._known_model_cautions.clear()
    arms = [cell(f"{n}", network={"dim": 8 + 2 * (n % 5)}) for n in range(10)]
    cells = [
        Cell(arm.options, Seed(seed, seed), {**arm.config, "seed_everything": seed})
        for seed in range(50)
        for arm in arms
    ]
    assert make_plan("g", cells, probe=False).cells == 500
    assert len(built) == 5 and sum(built.values()) <= 2 * 5


def test_time_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out batches of another length take as long as their FLOPs."""
    monkeypatch.setattr(probe, "probe_speed", lambda config, threads: Speed(2.0, 0.5))
    options = {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    data = {"lengths": [16, 32], "test_samples": 12}
    one = cell(trainer=options, data=data)
    found = make_plan("g", [one, cell(seed=1, trainer=options, data=data)], probe=True, jobs=2)
    model = LanguageModel(**NETWORK)
    longer = 2 * model.flops_per_token(32) / model.flops_per_token(16)
    seconds = CELL_SECONDS + 10 * 2.0 + 3 * 0.5 * (1 + longer)
    assert found.rows[0].seconds == pytest.approx(seconds) and found.rows[0].probed
    assert found.seconds == pytest.approx(PROCESS_SECONDS + seconds)


def test_makespan() -> None:
    assert makespan([], 2) == 0
    assert makespan([5, 1, 1, 1], 1) == PROCESS_SECONDS + 8
    assert makespan([5, 1, 1, 1], 2) == PROCESS_SECONDS + 5
    assert makespan([1, 1, 5], 2) == PROCESS_SECONDS + 6
    assert makespan([3], 8) == PROCESS_SECONDS + 3


def test_shapes_are_what_changes_the_time_of_an_update() -> None:
    base = training_shape(cell().config)
    for same in (
        cell(seed=3),
        cell(model={"lr": 0.5, "warmup": 0.1}),
        cell(trainer={"max_steps": 99}, data={"test_samples": 9, "reach": 4}),
    ):
        assert training_shape(same.config) == base
    for other in (
        cell(network={"dim": 16}),
        cell(data={"batch_size": 8}),
        cell(data={"length": 32}),
        cell(trainer={"accumulate_grad_batches": 2}),
        cell(trainer={"precision": "bf16-mixed"}),
        cell(model={"checkpoint": True}),
    ):
        assert training_shape(other.config) != base


def test_what_is_not_probed_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the nearest of the same layers; each set of layers has its turn before any has two."""
    probed: list[Any] = []

    def fake(config: Any, threads: int) -> Speed:
        probed.append((config["model"]["network"]["layers"][0]["name"], threads))
        return Speed(0.01 if probed[-1][0] == "linear" else 1.0, 3.0)

    monkeypatch.setattr(probe, "probe_speed", fake)
    monkeypatch.setattr(probe, "MOST_SHAPES", 3)
    delta = {"layers": [{"name": "delta", "heads": 2}], "dim": 128}
    linear = {dim: cell(network={"dim": dim}).config for dim in (8, 32, 64, 128)}
    trees = [*linear.values(), cell(network=delta).config]
    found = probe_speeds(trees, threads=2)
    assert probed == [("linear", 2), ("delta", 2), ("linear", 2)]
    assert [found[training_shape(tree)].probed for tree in trees] == [
        True,
        True,
        False,
        False,
        True,
    ]
    flops = {dim: sizes.sizes_of(tree).flops for dim, tree in linear.items()}
    want = flops[64] / flops[32]
    assert found[training_shape(linear[64])] == pytest.approx(Speed(0.01 * want, 3 * want, False))

    probed.clear()
    monkeypatch.setattr(probe, "MOST_SECONDS", 0.02)  # three updates would not fit
    assert [speed.probed for speed in probe_speeds(trees).values()].count(True) == len(probed) == 1


def test_a_probe_trains_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "ENOUGH_SECONDS", 0.01)
    threads = []
    step = LitModel.training_step

    def watched(self: Any, *args: Any) -> Any:
        threads.append(torch.get_num_threads())
        return step(self, *args)

    monkeypatch.setattr(LitModel, "training_step", watched)
    one = cell(trainer={"max_steps": 1000, "accumulate_grad_batches": 2})
    speed = probe.probe_speed(one.config, threads=2)
    assert speed.probed and speed.held_out > 0 and speed.update > 0
    assert {*threads} == {2} and 4 <= len(threads) < 1000
    assert torch.get_num_threads() == 1 and not [*tmp_path.iterdir()]
    assert configs.task_of(one.config).trainer is None
    assert capfd.readouterr().out == "" == capfd.readouterr().err


def test_clock_counts_updates_and_skips_the_first() -> None:
    assert probe._typical_span([0.0, 9.0, 10.0, 12.0, 13.0]) == 1.0
    assert probe._typical_span([0.0, 9.0]) == 9.0


def test_cautions_name_arms_and_the_way_out() -> None:
    late = {"layers": [{"name": "titans", "heads": 2, "mini_batch": 64}]}
    wide = {"layers": [{"name": "sliding", "heads": 2, "window": 16}]}
    short = {"layers": [{"name": "sliding", "heads": 2, "window": 4}]}
    nets = {"fine": {}, "late": late, "wide": wide, "short": short}
    arms = [cell(arm, seed, network=net) for seed in (0, 1, 2) for arm, net in nets.items()]
    first, second = cautions(arms, compared=True)
    assert first.startswith("late: titans: a mini-batch of 64 never fills")
    assert second.startswith("wide: sliding: a window of 16 covers all of a sequence of 16")
    (few,) = cautions(arms[:1], compared=True)
    assert few.startswith("fine: fewer than 3 seeds") and few.endswith(
        "give seeds [0, 1, 2] or more"
    )
    assert cautions(arms[:1], compared=False) == []
    many = [cell(f"{n}", network=wide) for n in range(5)]
    assert [line[:17] for line in cautions([*many, arms[0]], False)] == ["0; 1; 2 and 2 mor"]
    assert cautions(many, False)[0].startswith("every arm: sliding")


@pytest.mark.parametrize(("reach", "told"), [(None, False), (3, False), (15, True)])
def test_a_ceiling_of_one_is_told(reach: int | None, told: bool) -> None:
    lines = cautions([cell(data={"reach": reach})], compared=False)
    assert [line[:43] for line in lines] == ["a: the window arm's reach, 15 tokens back, "] * told


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe_speed", lambda config, threads: Speed(2.0, 0.5))
    monkeypatch.setattr(probe, "MOST_SHAPES", 1)
    cells = [cell("a", matched={"deviation": 0.021}), cell("b", network={"dim": 16})]
    found = make_plan("g", cells, [cell("a", 5, split="val", tuned={"lr": "1"})], compared=True)
    console = Console(width=160, record=True, file=io.StringIO())
    show_plan(found, console)
    lines = console.export_text().splitlines()
    rows = {line[:12].strip(): line.split() for line in lines if line.startswith("  ")}
    assert rows["a"][-3:-1] == ["+2.1%", rows["a"][-2]] and rows["a"][1:3] == ["1", "10"]
    assert rows["a (tuning)"][2:4] == ["1", "10"] and not rows["a"][-2].startswith("~")
    assert any(word.startswith("~") for word in rows["b"])
    assert any(line.startswith("g: 3 cells, 30 updates, ") for line in lines)
    assert any(line.startswith("warning: every arm: fewer than 3 seeds") for line in lines)


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command("quickstart", probe=False, jobs=3, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["jobs"] == 3 and found["warnings"] == [] and found["seconds"] is None
    arms = OmegaConf.load("ablations/grids/quickstart.yaml").axes.layer
    assert [(row["arm"], row["tuning"]) for row in found["rows"]] == [
        (arm, tuning) for tuning in (True, False) for arm in arms
    ]
    assert found["cells"] == 9 * len(arms) and found["updates"] == 500 * found["cells"]
