"""A resumed run is refused if it would go on with something else than it began with, and a new run
can start from the weights of another."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data import Continual, Copying, Text
from layerzoo.train.lit import load_model
from layerzoo.train.module import TaskModule
from layerzoo.train.resumed import Resumed
from layerzoo.train.trained_on import TRAINED_ON, trained_on

from .here import quick

NETWORK = [
    *("--model.network.dim", "16", "--model.network.depth", "1"),
    *("--model.network.layers", "[{name: linear, heads: 1}]"),
]
QUIET = [
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.callbacks", "layerzoo.checkpoints.Checkpoints", "--trainer.callbacks.steps", "1"),
    *("--trainer.logger.init_args.save_dir", "runs", "--trainer.logger.init_args.name", ""),
]
TEXT = [
    *(
        "--config",
        "text",
        "--data.init_args.files",
        "[data/*.txt]",
        "--data.init_args.length",
        "8",
    ),
    *("--data.init_args.batch_size", "2", "--data.init_args.val_samples", "2"),
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", *NETWORK, *QUIET),
]


def fit(name: str, *options: str) -> Path:
    version = ("--trainer.logger.init_args.version", name)
    assert main(["fit", *TEXT, *options, *version]) == 0
    return Path("runs", name)


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["fit", *TEXT, *options, "--trainer.logger.init_args.version", "refused"]) == 2
    error = capsys.readouterr().err
    *notes, error = error.splitlines()
    assert all(line.startswith("layerzoo: data: ") for line in notes)  # of another task's options
    assert error.startswith("layerzoo: error: ")
    assert not Path("runs/refused").exists()  # nothing is left of it
    return error.removeprefix("layerzoo: error: ") + "\n"


def end(run: Path, step: int = 2) -> dict[str, Any]:
    return torch.load(run / f"checkpoints/step={step}.ckpt", weights_only=True)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a run on it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data").mkdir()
        for n in range(4):
            Path(f"data/{n}.txt").write_text(f"{n} is what this file tells of. " * 4)
        fit("first")
    return folder


@pytest.fixture(autouse=True)
def _folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


RESUME = ("--ckpt_path", "runs/first/checkpoints/step=1.ckpt")


def test_a_checkpoint_and_a_record_say_what_was_trained_on() -> None:
    found = end(Path("runs/first"))[TRAINED_ON]
    settings, digest = found["settings"], found["digest"]
    assert settings["data"] == "layerzoo.data.text.Text" and settings["data.held_out"] == 0.05
    assert settings["data.batch_size"] == 2 and settings["data.files"] == ["data/*.txt"]
    assert settings["seed_everything"] == 0 and settings["trainer.precision"] == "32-true"
    assert [*digest] == ["data.files"]
    assert json.loads(Path("runs/first/record.json").read_text())["digest"] == digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data.init_args.batch_size", "4"), "data.batch_size: 4, but .* trained with 2;"),
        (("--data.init_args.seed", "1"), "data.seed: 1, but .* trained with 0;"),
        (("--seed_everything", "7"), "seed_everything: 7, but .* trained with 0;"),
        (("--data.init_args.held_out", "0.3"), "data.held_out: 0.3, but .* trained with 0.05;"),
        (("--data.init_args.val_samples", "4"), "data.val_samples: 4, but .* trained with 2;"),
        (("--data.init_args.documents", "true"), "data.documents: True, but .* with False;"),
        (("--data.init_args.files", "[data/1.txt]"), "data.files: its contents are others "),
        (("--trainer.accumulate_grad_batches", "2"), "trainer.accumulate_grad_batches: 2, but "),
        (("--trainer.gradient_clip_val", "1"), "trainer.gradient_clip_val: 1.*, but .* with None"),
        (("--trainer.precision", "bf16-mixed"), "trainer.precision: bf16-mixed, but .* 32-true"),
        (("--trainer.limit_train_batches", "3"), "trainer.limit_train_batches: 3, but .* 1.0"),
        (("--model.lr", "1e-4"), "model.lr: 0.0001, but .* trained with 0.003;"),
        (
            ("--data", "layerzoo.data.Copying", "--data.init_args.length", "8"),
            "data: layerzoo.data.copying.Copying, but .* trained with layerzoo.data.text.Text;",
        ),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(
    capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    error = refused(capsys, *RESUME, *change)
    assert re.match(message, error), error
    out = f"take its config, or start a new run from its weights: --model.init {RESUME[1]}\n"
    assert error.endswith(out)


def test_other_contents_of_the_same_path_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/1.txt").write_text("something else. " * 8)
    assert refused(capsys, *RESUME).startswith("data.files: its contents are others (")


def test_what_training_does_not_see_may_change() -> None:
    whole = end(Path("runs/first"))
    shutil.copytree("data", "elsewhere")
    shutil.rmtree("data")
    other = ("--data.init_args.files", "[./elsewhere/*, elsewhere/1.txt]")
    more = ("--data.init_args.test_samples", "5", "--data.init_args.lengths", "4,8")
    again = fit("again", *RESUME, *other, *more)
    for name, weight in end(again)["state_dict"].items():
        assert torch.equal(weight, whole["state_dict"][name]), name
    longer = fit("longer", *other, "--ckpt_path", str(again), "--trainer.max_steps", "3")
    assert end(longer, 3)[TRAINED_ON]["digest"] == whole[TRAINED_ON]["digest"]
    for command in ("validate", "test"):  # of any data
        options = ("--data.init_args.files", "[elsewhere/2.txt]", "--data.init_args.length", "2")
        assert main([command, *TEXT, *options, "--ckpt_path", str(again)]) == 0


def test_an_older_checkpoint_goes_on_with_a_warning() -> None:
    path = Path(RESUME[1])
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[TRAINED_ON], checkpoint["hyper_parameters"]["init"]
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=r"step=1.ckpt: is of an older version .* not checked"):
        fit("again", *RESUME, "--data.init_args.seed", "1")


def test_a_task_of_tasks_is_compared_task_by_task() -> None:
    def now(seed: int = 0, files: str = "data/*.txt") -> dict[str, Any]:
        tasks = [Copying(length=16), Text(files=[files], length=8)]
        trainer = Trainer(accelerator="cpu", logger=False)
        return trained_on(trainer, TaskModule(), Continual(tasks=tasks, seed=seed, updates=2), 0)

    def check(**changes: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("layerzoo.train.resumed.trained_on", lambda *of: now(**changes))
            Resumed("a.ckpt", before).check(None, None, None, 0)

    before = now()
    settings = before["settings"]
    assert settings["data.tasks.1"] == "layerzoo.data.copying.Copying"
    assert settings["data.tasks.1.length"] == 16 and settings["data.updates"] == 2
    check(files="./data/*")
    with pytest.raises(SpecError, match=r"^data.seed: 1, but .* trained with 0"):
        check(seed=1)
    with pytest.raises(SpecError, match=r"^data.tasks.2.files: its contents are others"):
        check(files="data/1.txt")


# --model.init


def test_a_new_run_starts_from_the_weights_of_another() -> None:
    first = load_model("runs/first/checkpoints/step=2.ckpt")
    start = ("--model.init", "runs/first", "--model.lr", "0")
    other = ("--data.init_args.files", "[data/1.txt]", "--seed_everything", "5")
    run = fit("new", *start, *other, "--data.init_args.length", "4")
    assert end(run)["global_step"] == 2  # a run of its own
    for name, weight in load_model(run / "checkpoints/step=2.ckpt").state_dict().items():
        assert torch.equal(weight, first.state_dict()[name]), name
    digest = end(run)[TRAINED_ON]["digest"]
    assert [*digest] == ["data.files", "model.init"]
    assert end(run)["hyper_parameters"]["init"] == "runs/first"
    assert json.loads((run / "record.json").read_text())["digest"] == digest


def test_a_run_that_started_from_weights_is_resumed_without_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = ("--model.init", "runs/first/checkpoints/step=2.ckpt")
    run = fit("new", *start)
    resume = ("--ckpt_path", str(run / "checkpoints/step=1.ckpt"))
    spelled = ("--model.init", "./runs/../runs/first")
    for name, given in {"spelled otherwise": spelled, "left out": ()}.items():
        again = fit(name, *given, *resume)
        assert end(again)[TRAINED_ON]["digest"] == end(run)[TRAINED_ON]["digest"]
        for weight, other in zip(
            end(run)["state_dict"].values(), end(again)["state_dict"].values(), strict=True
        ):
            assert torch.equal(weight, other), name
    error = refused(capsys, *resume, "--model.init", "runs/first/checkpoints/step=1.ckpt")
    assert error.startswith("model.init: runs/first/checkpoints/step=1.ckpt, but the checkpoint")
    shutil.rmtree("runs/first")
    fit("gone", *start, *resume)
    for command in ("validate", "test"):
        assert main([command, *TEXT, *start, "--ckpt_path", str(run)]) == 0


def test_weights_to_start_from_do_not_go_with_a_run_to_resume(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(capsys, *RESUME, "--model.init", "runs/first")
    assert error.startswith(
        "model.init: runs/first, but a resumed run has the weights of --ckpt_path; drop one"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.network.dim", "32"), "model.network.dim: 32, but the network of .* has 16; "),
        (
            ("--model.network.layers", "[{name: linear, heads: 2}]"),
            r"model.network.layers\[0\].heads: 2, but the network of .* has 1; give the same",
        ),
        (("--model.init", "data"), "checkpoint data: no checkpoint to read in it or its"),
        (("--model.init", "none.ckpt"), "checkpoint none.ckpt: cannot be read: No such file"),
        (("--model.init", "data/1.txt"), "checkpoint data/1.txt: is damaged, or not one that"),
    ],
)
def test_weights_of_another_network_are_refused(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    error = refused(capsys, "--model.init", "runs/first", *options)
    assert re.match(f"model.init: {message}", error), error
