"""Held-out figures by length: the table, the curves, the heat map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo.cli import main
from layerzoo.data import MQAR
from layerzoo.model import ModelConfig
from layerzoo.support.curve_plots import Family, draw, families
from layerzoo.train.command import quiet
from layerzoo.train.held_out import HeldOutFigures, Rows, markdown, table
from layerzoo.train.lit import LitModel

FIGURES = {
    "recall/accuracy": 0.5,
    "recall/accuracy/length=64": 0.6,
    "recall/accuracy/length=128": 0.4,
    "recall_depth/0/length=64": 0.1,
    "recall_depth/50/length=64": 0.2,
    "recall_depth/0/length=128": 0.3,
    "recall_depth/50/length=128": 0.4,
    "recall_lag/1": 1.0,
    "recall_lag/1/length=64": 1.0,
    "recall_lag/1/length=128": 1.0,
    "recall_lag/64/length=128": 0.0,
}


def test_families_are_read_from_names() -> None:
    found = {(family.name, family.sides): family for family in families(FIGURES)}
    assert [*found] == [
        ("recall/accuracy", ("length",)),
        ("recall_depth", ("depth", "length")),
        ("recall_lag", ("lag", "length")),
    ]  # a single point, recall_lag/1, is no curve
    depth = found["recall_depth", ("depth", "length")]
    assert depth.points == {(0, 64): 0.1, (0, 128): 0.3, (50, 64): 0.2, (50, 128): 0.4}
    assert depth.whole and not found["recall_lag", ("lag", "length")].whole
    assert families({"loss_at/1": 1.0, "loss_at/2": 2.0})[0].sides == ("position",)
    assert families({"recall/ceiling/a=1": 1.0, "recall/ceiling/a=2": 1.0}) == []  # flat


def test_a_whole_family_is_a_heat_map_and_others_are_curves() -> None:
    _, depth, lag = families(FIGURES)
    heat, *_ = draw(depth).axes
    assert heat.images and (heat.get_xlabel(), heat.get_ylabel()) == ("length", "depth")
    assert {text.get_text() for text in heat.texts} == {"0.10", "0.20", "0.30", "0.40"}
    assert heat.images[0].get_array().tolist() == [[0.1, 0.3], [0.2, 0.4]]  # type: ignore[union-attr]
    curves = draw(lag).axes[0]
    assert [[*line.get_ydata()] for line in curves.lines] == [[1.0], [1.0, 0.0]]  # type: ignore[arg-type]
    assert curves.get_xlabel() == "lag"


def test_the_table_has_a_column_for_each_part() -> None:
    parts = ["length=64", "length=128"]
    rows = table(FIGURES, parts)
    assert rows["recall/accuracy"] == [0.5, 0.6, 0.4]
    assert rows["recall_lag/64"] == [None, None, 0.0]
    text = markdown(rows, ["test", "mean", *parts]).splitlines()
    assert text[0] == "| test | mean | length=64 | length=128 |"
    assert "| recall_lag/64 |  |  | 0 |" in text
    assert table({"loss/held_out": 2.0}, [""]) == {"loss/held_out": [2.0]}


def test_test_at_many_lengths(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--data.batch_size", "8", "--data.val_samples", "8", "--data.test_samples", "20")
    small += ("--model.network.dim", "16", "--trainer.enable_progress_bar", "false")
    assert main(["fit", "--config", "mqar", *small, "--trainer.max_steps", "1"]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    capsys.readouterr()
    where = ("--ckpt_path", str(checkpoint), "--data.lengths", "64,128")
    assert main(["test", "--config", "mqar", *small, *where]) == 0
    out = capsys.readouterr().out
    assert "length=64" in out and "length=128" in out and "DataLoader" not in out
    (line,) = [line for line in out.splitlines() if "recall/queries" in line]
    assert line.split() == ["recall/queries", "160", "160", "160"]
    folder = tmp_path / "runs/mqar/version_1"
    assert (folder / "recall_lag-lag-length.png").stat().st_size > 1000
    events = EventAccumulator(str(folder)).Reload()
    assert "test/recall/accuracy/length=128" in events.Tags()["scalars"]
    assert "test/figures/recall_lag-lag-length" in events.Tags()["images"]
    assert "test/figures/text_summary" in events.Tags()["tensors"]
    assert main(["validate", "--config", "mqar", *small, "--ckpt_path", str(checkpoint)]) == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "recall/queries" in s]
    assert line.split() == ["recall/queries", "64"]


@pytest.mark.parametrize("lengths", [[64, 32], "64,32", "64, 32"])
def test_lengths_make_parts_of_the_test_split_alone(lengths: list[int] | str) -> None:
    task = MQAR(vocab_size=64, pairs=4, lengths=lengths, seed=3, test_samples=10)
    parts = task.parts("test")
    assert [*parts] == ["length=64", "length=32"] and [*task.parts("val")] == [""]
    for part, length in zip(parts.values(), (64, 32), strict=True):
        assert part.length == length and part.seed == 3 and part.samples["test"] == 10
    assert len(task.test_dataloader()) == 2


def test_a_setting_is_varied_from_what_it_sets() -> None:
    task = MQAR(setting="figure2/128x8", lengths=[256], vocab_size=1024)
    part = task.parts("test")["length=256"]
    assert isinstance(part, MQAR)
    assert (part.length, part.config.pairs, part.vocab_size) == (256, 8, 1024)


def test_the_mix_is_of_the_published_sets() -> None:
    task = MQAR(setting="recall-memory", train_samples=1800, test_samples=70, batch_size=10)
    train, test = task.parts("train"), task.parts("test")
    assert [part.samples["train"] for part in train.values()] == [1000, 200, 200, 200, 200]
    assert len(test) == 7 and "set=1024x256" in test
    order = task.order().tolist()
    assert len(order) == 180 and order.count(0) == 100 and order[:100].count(0) < 80
    shapes = {batch["tokens"].shape[1] for batch in task.train_dataloader()}
    assert shapes == {64, 128, 256}


def test_what_is_not_finite_stands_in_the_table_and_in_the_pictures() -> None:
    values = [math.nan, math.inf, -math.inf, 4096.0, 0.25, 1e308]
    rows: Rows = {"a": [*values]}
    (line,) = markdown(rows, ["x", *"abcdef"]).splitlines()[2:]
    assert line == "| a | nan | inf | -inf | 4,096 | 0.25 | 1e+308 |"
    lost = {"loss_at/1": math.nan, "loss_at/2": 2.0, "loss_at/4": math.inf}
    depth = {f"recall_depth/{d}/length={n}": 0.5 for d in (0, 50) for n in (64, 128)}
    depth |= {"recall_depth/0/length=64": math.nan, "recall_depth/50/length=64": math.inf}
    heat, curves = (draw(*families(found)) for found in (depth, lost))
    assert sorted(text.get_text() for text in heat.axes[0].texts) == ["0.50", "0.50", "inf", "nan"]
    assert [text.get_text() for text in curves.axes[0].texts] == ["nan", "inf"]
    for figures in (dict.fromkeys(lost, math.nan), dict.fromkeys(lost, math.inf)):
        FigureCanvasAgg(draw(*families(figures))).draw()
    none = Family("recall_depth", ("depth", "length"), {(0, 1): math.nan, (0, 2): math.inf})
    FigureCanvasAgg(draw(none)).draw()
    FigureCanvasAgg(draw(*families({**depth, "recall_depth/0/length=128": 1e300}))).draw()
    for figure in (heat, curves):
        FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize(
    ("scale", "loss", "perplexity"), [(math.nan, "nan", "nan"), (1e5, None, "inf")]
)
def test_a_model_that_is_lost_is_measured_all_the_same(
    tmp_path: Path, capsys, scale: float, loss: str | None, perplexity: str
) -> None:
    quiet()
    task = MQAR(vocab_size=64, length=32, pairs=4, test_samples=8, batch_size=8)
    lit = LitModel(
        network=ModelConfig.from_fields({"vocab_size": 64, "dim": 8, "layers": ["linear"]})
    )
    lit.model.norm.weight.data *= scale
    logger: Any = TensorBoardLogger(tmp_path, name="", version="")
    less: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[HeldOutFigures()], **less)
    trainer.test(lit, task, verbose=False)
    out = capsys.readouterr().out.splitlines()
    found = dict(line.split() for line in out if line.strip().startswith("loss/"))
    assert found["loss/perplexity"] == perplexity
    assert found["loss/held_out"] == loss if loss else float(found["loss/held_out"]) > 710
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (logged,) = events.Scalars("test/loss/perplexity")
    assert f"{logged.value}" == perplexity
