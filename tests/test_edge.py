"""The command's edge: errors of use in one line with status 2, whoever raises them and before any
work is done; which checkpoint a name means; output that nobody reads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from layerzoo import SpecError, cli
from layerzoo.ablations.running import folder as folders
from layerzoo.cli import TRACEBACK, main
from layerzoo.support import error_lines
from layerzoo.support.arguments import check_file
from layerzoo.train.find_checkpoint import find_checkpoint

from .here import quick

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = [
    *("--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--data.batch_size", "8"),
    *("--data.train_samples", "8", "--data.val_samples", "8", "--data.test_samples", "8"),
    *("--model.network.dim", "8", "--model.network.layers", "[{name: linear, heads: 1}]"),
    *("--trainer.log_every_n_steps", "1"),
    *QUIET,
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with quick():
        yield


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command refused in prints."""
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("layerzoo: ")]
    assert "Traceback" not in err
    return line.removeprefix("layerzoo: error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator", "gpu"], "trainer: No supported gpu backend found!"),
        (["--trainer.accelerator", "abacus"], "trainer: You selected an invalid accelerator name"),
        (["--trainer.devices", "0"], "trainer: `Trainer(devices='0')`"),
        (["--trainer.strategy", "none"], "trainer: You selected an invalid strategy name"),
        (["--trainer.max_steps", "-5"], "trainer.max_steps: must be at least -1, got -5"),
        (
            ["--trainer.limit_train_batches", "-1"],
            "trainer.limit_train_batches: must be a number of",
        ),
        (["--trainer.profiler", "none"], "trainer: When passing string value for the `profiler`"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: must be"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val: must be at least 0"),
        (["--trainer.precision", "3"], "trainer.precision: expected"),
        (["--trainer.logger", "WandbLogger"], "needs the package wandb: pip install wandb"),
        (["--trainer.logger", "none"], "trainer.logger: no class 'none'; give an import path"),
        (["--trainer.callbacks+=no.Such"], "trainer.callbacks: no.Such: No module named 'no'"),
        (["--seed_everything", "-1"], "seed_everything: must be in [0, 4294967295], got -1"),
        (["--seed_everything", "4294967296"], "seed_everything: must be in [0, 4294967295]"),
        (["--data", "{class_path: no.Such}"], "data: no.Such: No module named 'no'"),
        (["--data.seed", f"{2**64 + 1}"], "MQAR: seed: 18446744073709551617 does not fit"),
        (["--data.train_samples", f"{10**12}"], "MQAR: train_samples: must be in [1, 4294967296]"),
        (["--data.vocab_size", f"{10**20}"], "vocab_size: 100000000000000000000 does not fit"),
        (["--trainer.logger.init_args.save_dir", "/proc/x"], "trainer.logger.save_dir /proc/x"),
        (["--trainer.logger.init_args.save_dir", "file"], "cannot be written: "),
        (
            ["--trainer.logger", "false", "--trainer.default_root_dir", "/proc/x"],
            "checkpoints /proc/x/checkpoints: cannot be written: No such file or directory",
        ),
        (
            [
                "--trainer.callbacks+=layerzoo.checkpoints.Checkpoints",
                *("--trainer.callbacks.folder", "file"),
            ],
            "checkpoints file: cannot be written: ",
        ),
        (["--model.network.dim", f"{2**31}"], "take a smaller batch, length or model"),
        (["--model.network.vocab_size", f"{2**62}"], "take a smaller batch, length or model"),
        (["--model.network.persistent", f"{2**62}"], "take a smaller batch, length or model"),
        (["--model.network.mlp", f"{2**62}"], "take a smaller batch, length or model"),
        (["--model.network.conv", f"{2**63}"], "conv: 9223372036854775808 does not fit 64 bits"),
        (["--model.network.dim", "99999999999"], "take a smaller batch, length or model"),
    ],
)
def test_what_others_refuse_is_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    Path("file").write_text("is in the way")
    assert message in fails(capsys, "fit", "--config", "mqar", *SMALL, *options)
    assert not [*Path().rglob("*.ckpt")]


def test_a_grids_seed_is_one_that_a_run_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    Path("grid.yaml").write_text(
        "name: grid\nbase: mqar\naxes: {model.lr: [0.1]}\nseeds: [0, 4294967296]\n"
    )
    message = fails(capsys, "ablate", "plan", "grid.yaml", "--no-probe")
    assert message.startswith("grid grid.yaml:4: seeds.1: must be at most 4294967295")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("list --tazks", "list: --tazks: no such option; did you mean '--tasks'?"),
        ("list delta mesa", "list: unrecognized arguments: mesa"),
        ("ablate", "ablate: the following arguments are required: command"),
        ("ablate rum", "ablate: command: no 'rum'; did you mean 'run'?"),
        ("ablate run", "ablate run: the following arguments are required: grid"),
        ("ablate run quickstart --jobz 2", "--jobz: no such option; did you mean '--jobs'?"),
        ("ablate run quickstart --jobs two", "ablate run: --jobs: invalid int value: 'two'"),
    ],
)
def test_all_parsers_speak_alike(
    capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert message in fails(capsys, *command.split())


def test_a_fault_of_the_program_is_not_an_error_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr("layerzoo.tools.list.list_layers", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        main(["list"])
    assert error_lines.line(KeyError("x")) is None
    assert error_lines.line(OSError(13, "Permission denied", b"f")) == "f: Permission denied"


def test_where_an_error_was_raised_is_shown_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(SpecError, match="unknown command"):
        main(["lisst"])


# Which checkpoint a name means


def train(*options: str) -> None:
    assert main(["fit", "--config", "mqar", *SMALL, *options]) == 0


def test_last_is_the_newest_run(capsys: pytest.CaptureFixture[str]) -> None:
    resume = ("fit", "--config", "mqar", *SMALL, "--ckpt_path", "last")
    assert "there is no run in runs/mqar yet" in fails(capsys, *resume)
    test = ("test", "--config", "mqar", *SMALL, "--ckpt_path")
    for word in ("last", "best"):
        assert "there is no run in runs/mqar yet" in fails(capsys, *test, word)
    for word in ("hpc", "registry", "registry:name:1"):
        assert "layerzoo has no such place" in fails(capsys, *test, word)
    train()
    train()
    newest = find_checkpoint("last", "runs/mqar")
    assert Path(newest).parts[:3] == ("runs", "mqar", "version_1")
    assert main([*resume, "--trainer.max_steps", "2"]) == 0
    last = find_checkpoint("last", "runs/mqar")
    assert Path(last).parts[2] == "version_2" and torch.load(last)["global_step"] == 2
    assert main([*test, "last"]) == 0
    assert main([*test, "runs/mqar/version_0"]) == 0
    assert "compared no checkpoints" in fails(capsys, *test, "best")


def test_best_is_what_the_newest_run_held_for_its_best() -> None:
    monitor = ("--trainer.callbacks.monitor", "loss/held_out", "--trainer.max_steps", "3")
    train(*monitor, "--trainer.val_check_interval", "1", "--data.train_samples", "24")
    saved = torch.load(find_checkpoint("last", "runs/mqar"))["callbacks"]
    (state,) = [state for name, state in saved.items() if name.startswith("ModelCheckpoint")]
    best = find_checkpoint("best", "runs/mqar")
    assert Path(best).name == Path(state["best_model_path"]).name
    Path("runs").rename("elsewhere")  # a run's folder may move
    assert find_checkpoint("best", "elsewhere/mqar") == best.replace("runs", "elsewhere", 1)
    assert (
        main(["test", "--config", "mqar", *SMALL, "--ckpt_path", best.replace("runs", "e")]) == 2
    )


def test_every_command_takes_a_runs_folder(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    outputs = []
    for name in ("runs/mqar/version_0/checkpoints/last.ckpt", "runs/mqar/version_0", "last"):
        capsys.readouterr()
        assert main(["generate", name, "--tokens", "1 2", "--max_new_tokens", "5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert len({*outputs}) == 1
    Path("empty").mkdir()
    message = fails(capsys, "generate", "empty", "--tokens", "1")
    assert message.startswith("checkpoint empty: no checkpoint to read in it")


def test_a_run_does_not_go_into_another_ones_folder(capsys: pytest.CaptureFixture[str]) -> None:
    here = ("--trainer.logger.init_args.version", "a")
    train(*here)
    config = Path("runs/mqar/a/config.yaml")
    before = config.read_text()
    message = "runs/mqar/a: holds a run already; give --trainer.logger.init_args.version"
    assert message in fails(capsys, "fit", "--config", "mqar", *SMALL, *here)
    assert message in fails(capsys, "fit", "--config", str(config), *QUIET)
    assert config.read_text() == before


# Said before the work, not after it


@pytest.mark.parametrize("place", ["folder", "/proc/state", "file/state"])
def test_where_a_state_cannot_be_written_nothing_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    monkeypatch.setattr("layerzoo.tools.generate.model_of", lambda options: pytest.fail("read"))
    message = fails(capsys, "generate", "any.ckpt", "--tokens", "1", "--save_state", place)
    assert message.startswith(f"--save_state {place}: cannot be written: ")


def test_a_file_that_was_there_stays_as_it_is() -> None:
    path = Path("state")
    check_file("--save_state", path)
    assert not path.exists()
    path.write_text("kept")
    check_file("--save_state", path)
    assert path.read_text() == "kept"


def test_conversion_and_evaluation_see_their_folder_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = lambda *args: pytest.fail("work was done")  # noqa: E731
    monkeypatch.setattr("layerzoo.tools.convert.convert", fail)
    monkeypatch.setattr("layerzoo.tools.convert.load_source", fail)
    assert "--out /proc/x: cannot be written" in fails(
        capsys, "convert", "--source", ".", "--out", "/proc/x"
    )
    Path("config.json").write_text("{}")
    monkeypatch.setattr("layerzoo.tools.evaluate.command.variants_of", fail)
    evaluate = ("evaluate", ".", "--text", "stdlib", "--out", "/proc/x")
    assert "--out /proc/x: cannot be written" in fails(capsys, *evaluate)


# What prints


STREAMS = """
import os, runpy, sys
import layerzoo
layerzoo.list_layers()
for name in ("unread", "full"):  # a process each, of one that has the imports
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(name, status, file=sys.stderr, flush=True)
        continue
    if name == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
    sys.argv = ["layerzoo", "list"]
    runpy.run_module("layerzoo", run_name="__main__", alter_sys=True)
"""


def run(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    argv = ["bash", "-c", command, sys.executable, STREAMS]
    return subprocess.run(argv, capture_output=True, text=True, env=environment)


def test_closed_streams_and_full_disks() -> None:
    """Of processes, up to their ends: the status and all that is said."""
    done = run('"$0" -c "$1"')
    assert done.stdout == ""
    said = "layerzoo: error: No space left on device"
    assert done.stderr.splitlines() == ["unread 141", said, "full 2"]


@pytest.mark.slow
def test_a_command_starts_without_an_output() -> None:
    done = run('"$0" -m layerzoo --help >&-; echo $?')
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("command", ["list", "ablate list"])
def test_output_that_nobody_reads_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(command.split()) == 141
    assert capsys.readouterr().err == ""


def test_a_closed_stream_and_a_poor_encoding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list", "linear"]) == 0
    sys.stdout.close()  # what it was given
    poor = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", poor)
    assert main(["list", "delta"]) == 0
    printer = SimpleNamespace(main=lambda argv: print("\u00b1") or 0)
    monkeypatch.setitem(sys.modules, "printer", printer)
    monkeypatch.setitem(cli.COMMANDS, "say", ("printer", "prints what ASCII lacks"))
    assert main(["say"]) == 0
    assert poor.buffer.getvalue().endswith(b"?\n")
    assert capsys.readouterr().err == ""


def test_a_lock_is_seen_by_who_may_only_read(tmp_path: Path) -> None:
    with folders.cell_lock(tmp_path) as free:
        assert free
        (tmp_path / folders.LOCK).chmod(0o444)
        assert folders.cell_state(tmp_path) == "running"
        with folders.cell_lock(tmp_path) as again:
            assert not again
    assert folders.cell_state(tmp_path) == "pending"
