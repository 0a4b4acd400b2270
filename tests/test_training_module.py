"""A config trains another module than LitModel, by naming it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from layerzoo.cli import main
from layerzoo.model import LanguageModel
from layerzoo.train.callbacks import named_layers
from layerzoo.train.lit import LitModel
from layerzoo.train.module import TaskModule
from layerzoo.train.named_module import MODULE, named_module

OWN = '''
import torch
from torch import Tensor, nn
from layerzoo.layer import StateBytes
from layerzoo.module import TaskModule


class Bag(nn.Module):
    """Predicts a token from the mean of those before: no layer, no blocks, no network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 64})
        self.embedding = nn.Embedding(64, size)
        self.out = nn.Linear(size, 64)
        self.frozen = nn.Linear(size, size).requires_grad_(False)

    def hidden(self, tokens, state=None, documents=None):
        x = self.frozen(self.embedding(tokens)).cumsum(1)
        return x / torch.arange(1, tokens.shape[1] + 1)[:, None], None

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)

    def reach(self):
        return None

    def cautions(self, T: int) -> list[str]:
        return []

    def state_bytes(self, T: int) -> StateBytes:
        return StateBytes(T, 8)

    def flops_per_token(self, T: int) -> float:
        return 3.0

    def choices(self) -> dict[str, list[str]]:
        return {"bag": ["only"]}

    def forget_choices(self) -> None:
        pass


class Own(TaskModule):
    class Config(TaskModule.Config):
        size: int = 8

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = Bag(config.size)

    def rate(self, name: str) -> float:
        return 7.0 if "bias" in name else 1.0

    def training_step(self, batch, batch_idx):
        logits, labels, _ = self.labelled(batch)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss/train", loss)
        return loss


number = 3
class Other: pass
'''
SMALL = [
    *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--model.size", "6"),
    *("--trainer.check_val_every_n_epoch", "null", "--data.val_samples", "8"),
    *("--data", "MQAR", "--data.pairs", "4", "--data.vocab_size", "64", "--data.batch_size", "4"),
    *("--data.test_samples", "8", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.callbacks+", "layerzoo.checkpoints.Checkpoints"),
    *("--trainer.callbacks.steps", "1", "--trainer.callbacks.keep", "9"),
    *("--trainer.callbacks+", "layerzoo.callbacks.Diagnostics"),
]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module_of_a_test.py").write_text(OWN)
    (tmp_path / "own_module_that_fails.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


PATH = "own_module_of_a_test.Own"


def run(command: str, folder: str, *options: str) -> Path:
    name = "--trainer.logger.init_args."
    where = [f"{name}save_dir", folder, f"{name}name", "", f"{name}version", ""]
    assert main([command, *options, *where]) == 0
    return Path(folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/step=4.ckpt", weights_only=True)["state_dict"]


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("layerzoo: error: ") and error.count("\n") == 1
    return error


def test_a_run_of_another_module(capsys: pytest.CaptureFixture[str]) -> None:
    first = run("fit", "first", "--module", PATH, *SMALL)
    record = json.loads((first / "record.json").read_text())
    assert (record["state_bytes_memory"], record["flops_per_token"]) == (64, 3.0)
    assert record["impl"] == {"bag": ["only"]}
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["module"] == PATH and config["model"]["size"] == 6
    checkpoint = torch.load(first / "checkpoints/step=2.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["size"] == 6
    slow, *_, fast = checkpoint["optimizer_states"][0]["param_groups"]
    assert fast["initial_lr"] == pytest.approx(7 * slow["initial_lr"]) and fast["params"]

    saved = ("--config", str(first / "config.yaml"))
    resume = ("--ckpt_path", str(first / "checkpoints/step=2.ckpt"))
    again = run("fit", "again", *saved, *resume)
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(again)[name]), name
        changed = not torch.equal(weight, checkpoint["state_dict"][name])
        assert changed == ("frozen" not in name), name
    for command in ("validate", "test"):
        run(command, command, *saved, *resume)
        assert "recall/accuracy" in capsys.readouterr().out

    assert "model.size: 5, but the checkpoint to resume was trained with 6" in fails(
        capsys, "fit", *saved, *resume, "--model.size", "5"
    )
    assert "model.betas: " in fails(capsys, "fit", *saved, *resume, "--model.betas", "[0.5, 0.9]")
    wrong = fails(capsys, "validate", "--config", "mqar", *resume)
    assert "its size is no option of layerzoo.lit.LitModel; give the module" in wrong
    assert "is not of a language model" in fails(capsys, "generate", resume[1], "--prompt", "a")


def test_a_checkpoint_without_a_network_is_not_of_a_model_with_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, "other.ckpt")
    error = fails(capsys, "test", "--config", "mqar", "--ckpt_path", "other.ckpt")
    assert "other.ckpt: is no checkpoint of layerzoo.lit.LitModel" in error


def test_the_last_name_counts() -> None:
    Path("one.yaml").write_text("module: layerzoo.lit.LitModel\n")
    Path("two.yaml").write_text(f"name: {PATH}\nmodule: ${{name}}\n")
    Path("none.yaml").write_text("seed_everything: 1\n")
    own = named_module(["--module", PATH])
    assert own.__name__ == "Own" and issubclass(own, TaskModule)
    assert named_module([]) is named_module(["fit", "--config", "none.yaml"]) is LitModel
    assert named_module(["--config=two.yaml"]) is own
    assert named_module(["-c", "two.yaml", "--config", "none.yaml"]) is own
    assert named_module(["--config", "two.yaml", "--config", "one.yaml"]) is LitModel
    assert named_module([f"--module={PATH}", "--config=one.yaml"]) is LitModel
    assert named_module(["--config=one.yaml", f"--module={PATH}"]) is own


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Own", f"module: expected an import path such as {MODULE}, got 'Own'"),
        ("no_such_package.Own", "cannot be imported: No module named 'no_such_package'"),
        ("own_module_that_fails.Own", "No module named 'a_module_that_is_not_there'"),
        ("own_module_of_a_test.own", "has no 'own'; did you mean 'Own'?"),
        ("own_module_of_a_test.Other", "is no subclass of layerzoo.module.TaskModule"),
        ("own_module_of_a_test.number", "is no subclass of layerzoo.module.TaskModule"),
        ("layerzoo.module.TaskModule", "is no subclass of layerzoo.module.TaskModule"),
    ],
)
def test_an_unfit_module(capsys: pytest.CaptureFixture[str], path: str, message: str) -> None:
    assert message in fails(capsys, "fit", "--config", "mqar", "--module", path)


def test_options_are_those_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "fit", "--module", PATH, *SMALL, "--model.sizes", "3")
    assert "model.sizes: no such option; did you mean 'model.size'?" in error
    assert "got -1" in fails(capsys, "fit", "--module", PATH, *SMALL, "--model.lr", "-1")


def test_the_name_of_the_option_is_written_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert "write it in full" in fails(capsys, "fit", "--config", "mqar", "--modul", PATH)


def test_layers_are_named_by_block_and_place() -> None:
    layers: Any = [{"name": "parallel", "children": ["softmax", "linear"]}, "linear"]
    model = LanguageModel(vocab_size=8, dim=16, layers=layers)
    names = [name for name, _ in named_layers(model)]
    assert names == ["0.parallel", "0.0.softmax", "0.1.linear", "1.linear"]
