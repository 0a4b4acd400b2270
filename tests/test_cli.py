"""The command line: listings, generation, and bad input in one line without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerzoo import list_layers
from layerzoo.cli import main
from layerzoo.model import ModelConfig
from layerzoo.support.yaml_files import named_configs
from layerzoo.tools.generate import Printer
from layerzoo.train.lit import LitModel

NO_KERNEL = ["--model.impl", "triton"]
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
    for field in info["fields"]:
        assert f"  {field['name']}: " in page and field["doc"] in " ".join(page.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lisst"], "unknown command 'lisst'; did you mean 'list'?"),
        (["list", "linaer"], "unknown layer or task 'linaer'; did you mean 'linear'?"),
        (["list", "mqar"], "unknown layer or task 'mqar'; did you mean 'MQAR'?"),
        (["fit", "--config", "mqarr"], "did you mean 'mqar'?"),
        (["fit", "--config=mqarr"], "did you mean 'mqar'?"),
        (
            ["fit", "--config", "mqar", "--model.network.dimm", "3"],
            "model.network.dimm: no such option; did you mean 'model.network.dim'?",
        ),
        (
            ["fit", "--config", "mqar", "--model.network.dim", "abc"],
            "model.network.dim: expected int, got abc",
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
            "model.network.layers: expected dict or tuple, got linear",
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
        (
            ["fit", "--config", "mqar", "--model.network.layers", "[mesa]", *NO_KERNEL, *FAST],
            "mesa: impl 'triton' cannot run: it has no Triton kernel yet",
        ),
        (["fit", "--config", "text", "--data.files", "[/no/*]", *FAST], "nothing matches '/no/*'"),
        (["fit", "--config", "mqar", "--model.lr", "-1"], "model.lr: must be in [0, inf), got -1"),
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained models of bytes and of 16 tokens, and one of bytes that is another model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    layers = {"bytes": "sliding", "tokens": "sliding", "other": "linear"}
    for name, layer in layers.items():
        network = {"vocab_size": 16 if name == "tokens" else 256, "dim": 16, "layers": [layer]}
        lit = LitModel(network=ModelConfig.from_fields(network))
        content = {"state_dict": lit.state_dict(), "hyper_parameters": dict(lit.hparams)}
        torch.save(content, folder / name)
    return {name: str(folder / name) for name in layers}


def says(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["generate", *argv]) == 0
    return capsys.readouterr().out


def test_generate_takes_a_prompt_in_three_ways(
    capsys: pytest.CaptureFixture[str], checkpoints: dict[str, str]
) -> None:
    path = checkpoints["bytes"]
    out = says(capsys, path, "--prompt", "a b", "--max_new_tokens", "9")
    assert out.startswith("a b") and out.endswith("\n")
    Path("prompt").write_bytes(b"a b")
    files = ("--checkpoint", path, "--prompt_file", "prompt", "--max_new_tokens", "9")
    assert says(capsys, *files, "--piece", "1", "--impl", "recurrent") == out[3:]
    ids = says(capsys, path, "--tokens", "97 32 98", "--max_new_tokens", "9").split()
    assert bytes(map(int, ids)).decode(errors="replace") + "\n" == out
    last = ids[5]
    stopped = says(capsys, path, "--tokens", "97 32 98", "--stop", f"250 {last}").split()
    assert stopped == ids[: ids.index(last, 3) + 1]
    greedy = says(capsys, path, "--prompt", "a b", "--temperature", "0")
    for option in (("--top_k", "1"), ("--top_p", "1e-9")):
        assert says(capsys, path, "--prompt", "a b", *option) == greedy
    assert says(capsys, path, "--prompt", "a b") != says(
        capsys, path, "--prompt", "a b", "--seed", "1"
    )


def test_text_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    printer, shown = Printer(text=True), []
    for byte in "aé€".encode() + b"\xff\xe2":
        printer.put([byte])
        shown.append(capsys.readouterr().out)
    printer.end()
    assert shown == ["a", "", "é", "", "", "€", "\ufffd", ""]
    assert capsys.readouterr().out == "\ufffd\n"


def test_generate_goes_on_from_a_saved_state(
    capsys: pytest.CaptureFixture[str], checkpoints: dict[str, str]
) -> None:
    def ids(*argv: str, new: int = 6) -> list[str]:
        options = ("--temperature", "0", "--max_new_tokens", str(new), *argv)
        return says(capsys, checkpoints["tokens"], *options).split()

    first = ids("--tokens", "1 2 3", "--save_state", "state")
    again = ids("--state", "state", "--save_state", "state")
    assert len(first) == 9 and len(again) == 6
    assert first + again == ids("--tokens", "1 2 3", new=12)
    more = ids("--state", "state", "--tokens", "7 8", "--temperature", "1", new=40)
    whole = ids("--tokens", " ".join([*first, *again, "7 8"]), "--temperature", "1", new=40)
    assert more == whole[15:]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bytes"], "generate: needs --prompt, --prompt_file, --tokens or --state"),
        (["--prompt", "a"], "generate: needs one checkpoint: layerzoo generate CHECKPOINT .."),
        (["bytes", "--checkpoint", "bytes", "--prompt", "a"], "generate: needs one checkpoint"),
        (["bytes", "--promt", "a"], "--promt: no such option; did you mean '--prompt'?"),
        (["bytes", "--prompt", "a", "--tokens", "1"], "not allowed with argument --prompt"),
        (["bytes", "--prompt", ""], "prompt 0 is empty"),
        (["bytes", "--tokens", "1 b"], "--tokens: expected integers, got '1 b'"),
        (["bytes", "--prompt", "a", "--top_k", "x"], "--top_k: invalid int value: 'x'"),
        (["bytes", "--prompt", "a", "--top_p", "2"], "top_p: must be in (0, 1], or none, got 2"),
        (["bytes", "--prompt", "a", "--stop", "256"], "stop: 256 is outside the vocabulary"),
        (["bytes", "--prompt", "a", "--impl", "fast"], "impl 'fast' is unknown"),
        (["bytes", "--prompt_file", "no"], "--prompt_file no: No such file"),
        (["tokens", "--prompt", "a"], "--prompt: the model has 16 tokens, not bytes; use --tok"),
        (
            ["bytes", "--prompt", "a", "--save_state", "no/s"],
            "--save_state no/s: cannot be written: No such",
        ),
        (["bytes", "--state", "no"], "state no: cannot be read: No such file"),
        (["bytes", "--state", "bytes"], "state bytes: is damaged, or not one that layerzoo"),
        (["other", "--state", "saved"], "--state saved: state: is not of this model: 0.layer"),
    ],
)
def test_generate_refuses(
    capsys: pytest.CaptureFixture[str],
    checkpoints: dict[str, str],
    argv: list[str],
    message: str,
) -> None:
    says(capsys, checkpoints["bytes"], "--prompt", "a", "--save_state", "saved")
    for name, path in checkpoints.items():
        Path(name).symlink_to(path)
    assert message in fails(capsys, "generate", *argv)
