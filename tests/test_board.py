"""A grid in TensorBoard: what is written, read back."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_FAILURE,
    STATUS_RUNNING,
    STATUS_SUCCESS,
    STATUS_UNKNOWN,
)
from torch.utils.tensorboard import SummaryWriter

from layerzoo.ablations.cells.cell import Seed
from layerzoo.ablations.command import main
from layerzoo.ablations.reporting.board.hparams import write_hparams
from layerzoo.ablations.reporting.board.summary_run import write_summary_run
from layerzoo.ablations.reporting.results import read_all_results, read_results
from layerzoo.ablations.running.folder import cell_lock
from layerzoo.spec import SpecError

Curves = Mapping[str, Mapping[int, float]]


def grid(
    root: Path,
    axes: Mapping[str, Any],
    arms: Sequence[Mapping[str, str]],
    seeds: Sequence[Any] = (0, 1),
    **fields: Any,
) -> list[dict[str, Any]]:
    """Write a grid's folder in which no cell has run. Returns its cells."""
    seeds = [Seed(**seed) if isinstance(seed, dict) else Seed(seed, seed) for seed in seeds]
    cells = [
        {
            "path": f"{','.join(options.values())}/seed-{seed}-{n:08x}",
            "arm": ",".join(options.values()),
            "options": dict(options),
            "seed": seed._asdict(),
            "split": "test",
            "tuned": {},
            "matched": {},
            "identity": f"{n:08x}",
        }
        for n, (options, seed) in enumerate(itertools.product(arms, seeds))
    ]
    root.mkdir(parents=True)
    tree = {"name": root.name, "base": "mqar", "axes": axes, **fields}
    (root / "grid.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    write_cells(root, cells)
    return cells


def write_cells(root: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    (root / "cells.json").write_text(json.dumps(cells))
    for cell in cells:
        (root / cell["path"]).mkdir(parents=True, exist_ok=True)
        (root / cell["path"] / "config.yaml").write_text("data: {}\n")


def train(folder: Path, curves: Curves) -> None:
    """Log validation figures by step."""
    with SummaryWriter(str(folder)) as log:
        for name, curve in curves.items():
            for step, value in curve.items():
                log.add_scalar(name, value, step)


def finish(folder: Path, **metrics: float) -> None:
    with SummaryWriter(str(folder), filename_suffix=".measured") as log:
        for name, value in metrics.items():
            log.add_scalar(f"test/{name}", value, 10)
    sizes = {"parameters": 100, "state_bytes": 2048, "length": 64}
    (folder / "metrics.json").write_text(json.dumps({**sizes, **metrics}))


TWO = {"layer": {"window": {}, "memory": {}}}
LIMITS = ("lower", "upper")
ARMS = [{"layer": "window"}, {"layer": "memory"}]


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def layout(root: Path) -> Layout:
    (event,) = read(root / "summary").Tensors("custom_scalars__config__")
    return Layout.FromString(event.tensor_proto.string_val[0])


def show(root: Path) -> None:
    write_summary_run(read_results(root), {}, "")


def test_margins_are_t_intervals_over_the_seeds_that_have_a_step(tmp_path: Path) -> None:
    root = tmp_path / "g"
    window, *_ = cells = grid(root, TWO, ARMS, seeds=[0, 1, 2])
    at = {0: {9: 0.1, 19: 0.5}, 1: {9: 0.2, 19: 0.7}, 2: {9: 0.6}}  # seed 2 goes on
    for cell, recall in zip(cells, at.values(), strict=False):
        train(root / cell["path"], {"recall/accuracy": recall, "loss/train": {9: 4.0}})
    loss = {9: math.nan, 19: 2.0}
    train(root / cells[3]["path"], {"recall/accuracy": {9: 0.4}, "loss/held_out": loss})
    finish(root / window["path"], **{"recall/accuracy": 0.9})
    show(root)

    run = read(root / "summary" / "window")
    tags = ("mean/recall/accuracy", *(f"mean_interval/recall/accuracy/{s}" for s in LIMITS))
    mean, lower, upper = (curve(run, tag) for tag in tags)
    assert {*run.Tags()["scalars"]} == {*tags}  # and none of the test split, nor of training
    # t_{2, .975} = 4.302653: .3 ± 4.302653 * .264575 / sqrt 3; t_{1, .975} = 12.7062:
    # .6 ± 12.7062 * .141421 / sqrt 2.
    assert mean == pytest.approx({9: 0.3, 19: 0.6})
    assert upper == pytest.approx({9: 0.957241, 19: 1.870620}, abs=1e-5)
    assert lower == pytest.approx({9: -0.357241, 19: -0.670620}, abs=1e-5)

    run = read(root / "summary" / "memory")  # one seed, and what is not finite is no figure
    assert [curve(run, tag) for tag in tags] == [{9: pytest.approx(0.4)}] * 3
    assert curve(run, "mean/loss/held_out") == {19: 2.0}


def test_a_step_has_no_margin_where_a_seed_is_not_finite(tmp_path: Path) -> None:
    root = tmp_path / "g"
    cells = grid(root, TWO, ARMS, seeds=[0, 1])
    for cell, second in zip(cells, (math.nan, 2.0, 2.0, math.inf), strict=True):
        train(root / cell["path"], {"loss/held_out": {9: 3.0, 19: second}})
    show(root)  # the others' mean would be of those that are not lost
    for arm in ("window", "memory"):
        assert curve(read(root / "summary" / arm), "mean/loss/held_out") == {9: 3.0}


def test_a_pooled_margin_has_the_seeds_that_all_its_arms_have(tmp_path: Path) -> None:
    root = tmp_path / "g"
    axes = {**TWO, "decay": {"off": {}, "on": {}}}
    arms = [{"layer": layer, "decay": decay} for layer in TWO["layer"] for decay in ("off", "on")]
    cells = grid(root, axes, arms, seeds=[0, 1], report={"by": ["layer"]})
    values = ((0.1, 0.9), (0.5, None), (0.0, 0.0), (1.0, 1.0))  # arm by arm, seed by seed
    for cell, value in zip(cells, itertools.chain(*values), strict=True):
        if value is not None:
            train(root / cell["path"], {"recall/accuracy": {9: value}})
    show(root)
    for name, mean in (("window", 0.3), ("memory", 0.5)):
        run = read(root / "summary" / "by_layer" / name)
        assert curve(run, "mean/by_layer/recall/accuracy") == {9: pytest.approx(mean)}
    assert [category.title.rpartition(", ")[2] for category in layout(root).category] == [
        "by layer",
        "mean and 95% t interval over seeds",
    ]


@pytest.mark.parametrize("options", (3, 5))
def test_every_tag_of_the_layout_is_there(tmp_path: Path, options: int) -> None:
    """A chart of a mistyped tag is empty, and so is one of a tag with a parenthesis."""
    root = tmp_path / "g"
    size = [f"size={n}" for n in range(options)]
    axes = {**TWO, "size": [*range(options)]}
    arms = [{"layer": layer, "size": n} for layer in TWO["layer"] for n in size]
    report = {"by": ["layer"], "metric": "errors/stale"}
    for n, cell in enumerate(grid(root, axes, arms, report=report)):
        names = ("recall/accuracy", "loss/held_out", "errors/stale")
        train(root / cell["path"], {name: {9: n} for name in names})
    show(root)
    runs = {path.parent for path in (root / "summary").rglob("events.*.summary")}
    assert len(runs) == 1 + len(arms) + 2
    tags = {run: {*read(run).Tags()["scalars"]} for run in runs}
    charts = {c.title: c.chart for c in layout(root).category}
    assert len(charts) == 1 + (1 if len(arms) <= 7 else 2)
    named = []
    for title, inside in charts.items():
        # The page shows them from the last to the first, so the headline is the first.
        assert [chart.title for chart in reversed(inside)] == [
            "errors/stale",
            "recall/accuracy",
            "loss/held_out",
        ]
        for chart in inside:
            (series,) = chart.margin.series
            lines = [run for run in runs if series.value in tags[run]]
            assert len(lines) == (
                2 if "by layer" in title else min(len(arms), 6 if options == 3 else 5)
            )
            for run in lines:
                assert {series.value, series.lower, series.upper} <= tags[run]
            named += [series.value, series.lower, series.upper]
    assert len({*named}) == len(named) and {*named} == set().union(*tags.values())
    assert not any(set("()[]") & set(tag) for tag in named)


def test_text_and_figures(tmp_path: Path) -> None:
    root = tmp_path / "g"
    cells = grid(root, TWO, ARMS)
    train(root / cells[0]["path"], {"loss/held_out": {9: 1.0}})
    before = {path: path.read_bytes() for path in root.rglob("events.*")}
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1])
    for text in ("old", "| arm |\n| --- |\n| window |"):  # written twice: the first goes
        write_summary_run(read_results(root), {"recall by lag": figure}, text)
    run = read(root / "summary")
    assert run.Tags()["images"] == ["all arms/recall by lag"]
    (event,) = run.Tensors("all arms/results/text_summary")
    assert event.tensor_proto.string_val[0].decode().endswith("| window |")
    assert len([*root.rglob("events.*.summary")]) == 2
    assert before.items() <= {p: p.read_bytes() for p in root.rglob("events.*")}.items()


def parsed(folder: Path, tag: str) -> Any:
    about = read(folder).summary_metadata[f"_hparams_/{tag}"].plugin_data.content
    read_as = {
        "experiment": metadata.parse_experiment_plugin_data,
        "session_start_info": metadata.parse_session_start_info_plugin_data,
        "session_end_info": metadata.parse_session_end_info_plugin_data,
    }
    return read_as[tag](about)


def columns(folder: Path) -> dict[str, float | str]:
    found = parsed(folder, "session_start_info").hparams
    return {n: getattr(v, v.WhichOneof("kind")) for n, v in found.items()}


def test_hparams_have_the_columns_of_all_cells(tmp_path: Path) -> None:
    root = tmp_path / "g"
    axes = {**TWO, "decay": {"none": {}, "0.5": {}}, "model.network.conv": [0, 3]}
    arms = [
        {"layer": "window", "model.network.conv": "conv=0"},
        {"layer": "memory", "decay": "none", "model.network.conv": "conv=3"},
        {"layer": "memory", "decay": "0.5", "model.network.conv": "conv=3"},
    ]
    law = {"y": "capacity/d90", "x": ["state_bytes_memory"]}
    report = {"metric": "errors/stale", "scaling": [law]}
    cells = grid(root, axes, arms, when={"decay": {"layer": "memory"}}, report=report)
    cells[2]["tuned"] = {"model.lr": "lr=0.01"}
    write_cells(root, cells)
    folders = [root / cell["path"] for cell in cells]
    finish(folders[0], **{"loss/held_out": 3.0, "recall/half_life": 4.0})
    finish(folders[2], **{"errors/stale": 0.1, "capacity/d90": 8.0, "state_bytes_memory": 512.0})
    (folders[1] / "diverged.json").write_text("{}")
    (folders[3] / "failed.json").write_text("{}")
    (folders[4] / "checkpoints").mkdir()
    (folders[4] / "checkpoints" / "step=5.ckpt").touch()  # started; cell 5 is pending
    for _ in range(2):  # the second time anew
        write_hparams([read_results(root)], root)

    assert columns(folders[0]) == {
        "layer": "window",
        "model.network.conv": 0.0,
        "seed": "0",
        "parameters": 100.0,
        "state_bytes": 2048.0,
    }
    assert columns(folders[2])["decay"] == "none" and columns(folders[4])["decay"] == "0.5"
    assert columns(folders[2])["model.lr"] == 0.01
    assert columns(folders[2])["state_bytes_memory"] == 512.0
    assert columns(folders[3])["seed"] == "1" and "parameters" not in columns(folders[3])
    expected = (STATUS_SUCCESS, STATUS_FAILURE, STATUS_SUCCESS, STATUS_FAILURE, STATUS_UNKNOWN)
    status = [parsed(folder, "session_end_info").status for folder in folders[:5]]
    assert status == [*expected]
    assert not [*folders[5].glob("events.*")]
    assert len([*root.rglob("events.*.hparams")]) == 1 + 5

    experiment = parsed(root, "experiment")
    infos = {info.name: info for info in experiment.hparam_infos}
    assert {*infos} == set().union(*(columns(folder) for folder in folders[:5]))
    words = {name: [*infos[name].domain_discrete] for name in infos}
    assert words["seed"] == ["0", "1"]
    assert words["layer"] == ["window", "memory"] and words["decay"] == ["none", "0.5"]
    for name, info in infos.items():
        assert info.type == (DATA_TYPE_STRING if words[name] else DATA_TYPE_FLOAT64)
    assert [info.name.tag for info in experiment.metric_infos] == [
        "test/errors/stale",
        "test/loss/held_out",
        "test/capacity/d90",
    ]


def test_hparams_of_several_grids(tmp_path: Path) -> None:
    for name, size in (("a", "size=1"), ("b", "large")):
        axes = {"size": [1]} if name == "a" else {"size": {"large": {}}, **TWO}
        arm = {"size": size} if name == "a" else {"size": size, "layer": "window"}
        (cell,) = grid(tmp_path / name, axes, [arm], seeds=[{"init": 3, "data": 4}])
        finish(tmp_path / name / cell["path"], **{"loss/held_out": 1.0})
    write_hparams(read_all_results(tmp_path), tmp_path)
    names = [
        {info.name: info.type for info in parsed(tmp_path / folder, "experiment").hparam_infos}
        for folder in (".", "a", "b")
    ]
    assert columns(tmp_path / "b" / cell["path"])["seed"] == "3-data-4"
    sizes = {"parameters": DATA_TYPE_FLOAT64, "state_bytes": DATA_TYPE_FLOAT64}
    shared = {**sizes, "seed": DATA_TYPE_STRING}
    assert names == [
        {**shared, "size": DATA_TYPE_STRING, "layer": DATA_TYPE_STRING},
        {**shared, "size": DATA_TYPE_FLOAT64},
        {**shared, "size": DATA_TYPE_STRING, "layer": DATA_TYPE_STRING},
    ]


def test_a_size_that_is_not_finite_is_a_word(tmp_path: Path) -> None:
    """TensorBoard's pages are JSON, which has no number for it."""
    root = tmp_path / "g"
    law = {"y": "loss/held_out", "x": ["recall/half_life"]}
    cells = grid(root, TWO, ARMS, seeds=[0], report={"scaling": [law]})
    for cell, size in zip(cells, (math.inf, 2.0), strict=True):
        finish(root / cell["path"], **{"loss/held_out": 1.0, "recall/half_life": size})
    write_hparams([read_results(root)], root)
    found = [columns(root / cell["path"])["recall/half_life"] for cell in cells]
    assert found == ["inf", "2.0"]


def test_a_running_cell_says_so(tmp_path: Path) -> None:
    root = tmp_path / "g"
    cell, *_ = grid(root, TWO, ARMS)
    with cell_lock(root / cell["path"]):
        write_hparams([read_results(root)], root)
    assert parsed(root / cell["path"], "session_end_info").status == STATUS_RUNNING


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")  # TensorBoard's
def test_board_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="run a grid with --out"):
        main(["board", str(tmp_path)])
    with pytest.raises(SpecError, match="--port: must be at least 0"):
        main(["board", str(tmp_path), "--port", "-1"])
