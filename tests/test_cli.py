"""The command line: listings, generation, and bad input in one line without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerzoo import list_layers
from layerzoo.cli import main
from layerzoo.training import named_configs

FAST = ["--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.callbacks", "null"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # whatever a run writes by default


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command prints."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("layerzoo: error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_list_has_a_line_for_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list_layers()
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list_layers()
    assert {"name", "kind", "state_bytes", "source"} <= rows[0].keys()
    sizes = {row["name"]: row["state_bytes"] for row in rows}
    assert sizes["linear"] == 4 * 4 * 64 * 64  # 4 heads of 64 x 64 float32


@pytest.mark.parametrize("name", list_layers())
def test_list_name_shows_equation_and_fields(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["list", name, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert main(["list", name]) == 0
    page = capsys.readouterr().out
    assert "=" in info["doc"] and info["source"] in page  # an equation, and where it is from
    explained = " ".join(info["field_docs"]) + info["doc"]
    for field in info["fields"]:
        assert f"  {field}: " in page
        assert field in explained, f"{name}.{field} is not explained"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lisst"], "unknown command 'lisst'; did you mean 'list'?"),
        (["list", "linaer"], "unknown layer 'linaer'; did you mean 'linear'?"),
        (["fit", "--config", "mqarr"], "did you mean 'mqar'?"),
        (["fit", "--config=mqarr"], "did you mean 'mqar'?"),
        (
            ["fit", "--config", "mqar", "--model.network.dimm", "3"],
            "model.network.dimm: no such option; did you mean 'model.network.dim'?",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.dim", "abc"],
            "model.network.dim: Expected a <class 'int'>",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.layers", "[linaer]"],
            "model.network: layers[0]: unknown layer 'linaer'; did you mean 'linear'?",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.layers", "[{name: linear, head: 2}]"],
            "model.network: layers[0]: linear: unknown field 'head'; did you mean 'heads'?",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.layers", "[{name: linear, heads: x}]"],
            "model.network: layers[0]: linear: heads: expected int, got 'x'",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.layers", "linear"],
            "model.network.layers: Expected dict or tuple, got linear",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.overrides", "{-1: {childre: []}}"],
            "model.network: overrides[-1]: parallel: unknown field 'childre'; did you mean",
        ),
        (
            [
                *("fit", "--config", "mqar", "--model.network.layers", "{a: linear}"),
                *("--model.network.pattern", "a*2 b"),
            ],
            "model.network: pattern: no layer 'b'; known: a",
        ),
        (["fit", "--config", "mqar", "--data", "MQARR"], "did you mean 'MQAR'?"),
        (["fit", "--config", "mqar", "--data.pairs", "70"], "MQAR: pairs: 70"),
        (["fit", "--config", "mqar", "--data.pairz", "7"], "did you mean 'pairs'?"),
        (["fit", "--config", "mqar", "--data.vocab_size", "128", *FAST], None),
        (
            ["fit", "--config", "mqar", "--model.network.vocab_size", "32", *FAST],
            "set model.network.vocab_size to 64",
        ),
        (["fit", "--config", "mqar", "--model.impl", "triton", *FAST], "no Triton kernel yet"),
        (["fit", "--config", "text", "--data.files", "[/no/*]", *FAST], "nothing matches '/no/*'"),
        (["fit", "--config", "mqar", "--model.lr", "-1"], "model.lr: must be in [0, inf], got -1"),
        (["fit", "--config", "mqar", "--data.alpha", "-500"], "alpha: must be in (0, 2]"),
        (["fit", "--config", "text", "--data.files", "[/tmp]", *FAST], "is a folder; write"),
        (["fit", "--config", "mqar", "--data", "Text"], "not an option of the chosen class"),
        (["test", "--config", "mqar"], "test: needs --ckpt_path"),
        (["test", "--config", "mqar", "--ckpt_path", "/no.ckpt"], "checkpoint /no.ckpt: cannot"),
        (["generate", "/no.ckpt", "--prompt", "a"], "checkpoint /no.ckpt: cannot be read"),
        (["ablate", "run", "quikstart"], "no grid 'quikstart'; did you mean 'quickstart'?"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str | None
) -> None:
    if message is None:  # an interpolation follows an override on the command line
        assert main(argv) == 0
    else:
        assert message in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("data.init_args.vocab_size", "data.init_args.vocabsize", "did you mean 'data.init_args"),
        ("  lr:", "  lrr:", "model.lrr: no such option; did you mean 'model.lr'?"),
        ("pairs:", "pairz:", "data: pairz: no such option; did you mean 'pairs'?"),
        ("depth: 2", "depth: two", "model.network.depth"),
        ("model:", "model: [", "bad.yaml:"),
    ],
)
def test_bad_config_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, before: str, after: str, message: str
) -> None:
    text = named_configs()["mqar"].read_text()
    assert before in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(before, after))
    assert message in fails(capsys, "fit", "--config", str(path))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"- a"])
def test_a_config_that_is_none_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert str(path) in fails(capsys, "fit", "--config", str(path))


def test_a_corrupt_checkpoint_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    whole = tmp_path / "other.ckpt"
    torch.save({"weights": torch.zeros(100)}, whole)
    for content in (b"", b"garbage", whole.read_bytes()[:300], whole.read_bytes()):
        path.write_bytes(content)
        for argv in (
            ("generate", str(path), "--prompt", "a"),
            ("test", "--config", "mqar", "--ckpt_path", str(path)),
        ):
            assert "is damaged, or not one that layerzoo wrote" in fails(capsys, *argv)


@pytest.mark.parametrize("name", list_layers())
def test_list_explains_every_layer(name: str, capsys) -> None:
    assert main(["list", name]) == 0
    page = capsys.readouterr().out
    assert page.startswith(name) and "Config fields:" in page
    assert main(["list", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name
