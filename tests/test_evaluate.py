"""`layerzoo convert` and `evaluate`: what is compared, on which text, and how it is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data import Text
from layerzoo.data.task import IGNORE
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.hf import load
from layerzoo.hf.modes import mode
from layerzoo.tools import convert as convert_command
from layerzoo.tools.evaluate import command as evaluate
from layerzoo.tools.evaluate import costs
from layerzoo.tools.evaluate.command import answered
from layerzoo.tools.evaluate.harness import numbers
from layerzoo.tools.evaluate.page import harness_table, page
from layerzoo.tools.evaluate.positions import difference, held_out, losses, ranges, recovered
from layerzoo.tools.evaluate.probe import explained, variance_share

from .extras import need

BIASED = "{name: linear, key_bias: true}"
WORDS = "\n".join(f"line {n} of the {n % 7} texts" for n in range(40))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a source model, its tokenizer of bytes, and two texts of ten files."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = LlamaConfig(vocab_size=256, **sizes, **heads, bos_token_id=None, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained("source")
    level = tokenizers.pre_tokenizers.ByteLevel
    vocab = {letter: n for n, letter in enumerate(sorted(level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save("source/tokenizer.json")
    Path("source/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"})
    )
    for text in ("a", "b"):
        Path(text).mkdir()
        for n in range(10):
            Path(text, f"{n}.txt").write_text(f"{text} {n}\n{WORDS}")
    return tmp_path


def convert(out: str, *options: str) -> int:
    memory = "{name: allmem, mini_batch: 4}"
    words = ["--source", "source", "--memory", memory, "--window", "16", "--sinks", "2"]
    return main(["convert", *words, *options, "--out", out])


def test_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("made", "--layers", "-1") == 0
    said = capsys.readouterr().out
    assert "made: 1 of 2 blocks converted; " in said
    model = load("made")
    added, theirs = model.added_parameters()
    assert f"{added:,} parameters added to {theirs:,} ({100 * added / theirs:.1f}%)" in said
    assert model.config.blocks == [1] and model.config.memory["mini_batch"] == 4
    assert Tokenizer("made").vocab_size == 256
    again = {name: p for name, p in model.memory_parameters()}
    convert("same", "--layers", "1")
    for name, parameter in load("same").memory_parameters():
        assert torch.equal(parameter, again[name])


def test_generate_continues_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("made")
    capsys.readouterr()
    words = ["--prompt", "line 1", "--temperature", "0", "--max_new_tokens", "5", "--save_state"]
    assert main(["generate", "made", *words, "state"]) == 0
    first = capsys.readouterr().out
    model = load("made")
    x = torch.tensor([Tokenizer("made").encode([b"line 1"])[0].tolist()])
    decode = Tokenizer("made").decoder()
    made = model.generate(x, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]
    assert first == "".join(decode([token]) for token in made.tolist()) + "\n"
    assert main(["generate", "made", "--state", "state", *words[2:], "again"]) == 0


@torch.no_grad()
def test_centred_keys_have_no_mean(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of grouped heads, in a reset too, on text that is trained on; nothing else is another."""
    monkeypatch.setattr(convert_command, "CENTRE_TOKENS", 64)
    for memory in (BIASED, "{name: linear}"):
        reset = f"{{name: reset, every: 5, children: [{memory}]}}"
        text = ["--centre", "a/*.txt", "--centre", "b/*.txt", "--held_out", "0.4"]
        centre = text if "bias" in memory else []
        convert(f"made{len(centre)}", "--memory", reset, *centre)
    model, plain = load("made6"), load("made0")
    text = Text(files=["a/*.txt", "b/*.txt"], held_out=0.4, length=64, tokenizer="source")
    tokens = torch.from_numpy(text.sample("train", np.arange(8))["tokens"])
    source = AutoModelForCausalLM.from_pretrained("source").model
    seen = source(tokens, output_hidden_states=True).hidden_states
    for x, block, theirs in zip(seen, model.each_block(), source.layers, strict=False):
        h = theirs.input_layernorm(x)
        mean = theirs.self_attn.k_proj(h).mean((0, 1))
        memory = block.layer.layers[1].layers[0]
        assert memory.key_bias.shape == (2, 8) and mean.norm() > 0.01
        assert torch.allclose(memory.key_bias, -mean.expand(2, 8), atol=1e-6)
    own = dict(plain.named_parameters())
    others = {n: p for n, p in model.named_parameters() if "key_bias" not in n}
    assert others.keys() == own.keys() and all(torch.equal(p, own[n]) for n, p in others.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "new", "--centre", "a/*.txt"], "--centre: no memory has a key bias; set key_"),
        (["--out", "new", "--centre", "c/*.txt", "--memory", BIASED], "--centre: data: Text"),
        (["--out", "source"], "--out source: is there already"),
        (["--out", "new", "--source", "nowhere"], "source: nowhere: "),
        (["--out", "new", "--layers", "one"], "expected integers, as in 1,2, got 'one'"),
        (["--out", "new", "--memory", "{name: [}"], "not YAML"),
    ],
)
def test_what_convert_refuses(
    folder: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries long
    assert main(["convert", "--source", "source", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not Path("new").exists()


def test_a_share_is_of_means_and_its_interval_a_jackknife() -> None:
    full, window = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 3.0, 4.0, 5.0])
    other = np.array([1.5, 2.5, 3.5, 4.5])
    assert recovered(full, window, other) == (0.5, 0.0)
    other += np.array([0.1, -0.1, 0.0, 0.0])  # with one gap for all the share is a mean
    value, half = recovered(full, window, other)
    error = (window - other).std(ddof=1) / 2
    assert value == pytest.approx(0.5) and half == pytest.approx(3.182446 * error, rel=1e-6)
    # Of means: a mean of shares would be 1/4.
    gaps = np.array([3.0, 1.0, 1.0, 1.0])
    assert recovered(full, full + gaps, full + gaps * [0, 1, 1, 1])[0] == 0.5
    assert np.isnan(recovered(full[:1], window[:1], other[:1]).half)
    value, half = difference(other, full)
    error = (other - full).std(ddof=1) / 2
    assert (value, half) == pytest.approx((0.5, 3.182446 * error), rel=1e-6)


def test_ranges() -> None:
    assert ranges(16, 64) == {
        "inside": slice(0, 16),
        "past window": slice(16, 64),
        "past 32": slice(32, 64),
    }
    assert list(ranges(40, 64)) == ["inside", "past window"]
    assert list(ranges(64, 64)) == ["inside"]


def test_held_out_files_are_those_that_are_not_trained_on(folder: Path) -> None:
    patterns = ["a/*.txt", "b/*.txt"]
    rows = held_out(patterns, 0.2, 60, 3, Tokenizer("source"))
    trained = Text(files=patterns, held_out=0.2, length=8, tokenizer="source")
    trained.setup()
    decode = Tokenizer("source").decoder
    text = decode()(trained.tokens("train").tolist())
    assert [len(own) for own in rows.values()] == [3, 3]
    for pattern, own in rows.items():
        for row in own:
            name = decode()(row.tolist())[:4]
            assert name.startswith(pattern[0]) and name not in text and len(row) == 61
    with pytest.raises(SpecError, match=r"--text a/\*.txt: no held-out file has 9001 tokens"):
        held_out(patterns, 0.2, 9000, 3, Tokenizer("source"))


@torch.no_grad()
def test_losses_are_those_of_transformers(folder: Path) -> None:
    convert("made")
    model = load("made")
    tokens = torch.randint(256, (2, 41))
    logits = AutoModelForCausalLM.from_pretrained("source")(tokens[:, :-1]).logits
    want = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    with mode(model, "full"):
        got = losses(model, tokens)
    assert got.shape == (2, 40) and np.allclose(got, want, atol=1e-5)
    assert not np.allclose(losses(model, tokens)[:, 20:], want[:, 20:], atol=1e-5)


def test_what_scales_alone_can_explain() -> None:
    torch.manual_seed(0)
    missed = torch.randn(4, 50, 8)
    factors = torch.linspace(-2, 2, 8)  # none is 0
    assert variance_share(missed * factors, missed) == pytest.approx(1)
    assert variance_share(torch.randn(4, 50, 8), missed) < 0.02
    assert variance_share(torch.ones(4, 50, 8), missed + 3) == 0  # a constant is no memory
    assert variance_share(missed * factors + 7, missed + 3) == pytest.approx(1)
    noisy = missed + torch.randn(4, 50, 8)  # the best scale is 1/2
    assert variance_share(noisy, missed) == pytest.approx(0.5, abs=0.03)


@torch.no_grad()
def test_probe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the first block by hand; whatever the scales are, and they stay what they are."""
    convert("made", "--layers", "1")
    convert("loud", "--scale_init", "1.0")
    words = ["--text", "a/*.txt", "--held_out", "0.4", "--length", "64", "--files", "4"]
    ask = [*words, "--control", "loud=loud", "--threads", "1", "--out", "found"]
    assert main(["evaluate", "made", "--probe", *ask]) == 0
    found = json.loads(Path("found/evaluation.json").read_text())["probe"]
    assert len(found["memory"]) == 1 and len(found["loud"]) == 2  # the converted blocks
    model = load("loud")
    rows = held_out(["a/*.txt"], 0.4, 64, 4, Tokenizer("made"))["a/*.txt"]
    tokens = torch.from_numpy(np.stack(rows))[:, :-1]
    layer = model.model.layers[0]
    h = layer.input_layernorm(model.embedding(tokens))
    window = layer.self_attn.layers[0]
    source = AutoModelForCausalLM.from_pretrained("source").model
    places = source.rotary_emb(h, position_ids=torch.arange(64)[None])
    full, _ = source.layers[0].self_attn(h, position_embeddings=places, attention_mask=None)
    memory = layer.self_attn(h)[0] - window(h)[0]  # the scale is 1
    want = variance_share(memory[:, 16:], (full - window(h)[0])[:, 16:])
    assert found["loud"][0] == pytest.approx(want, abs=1e-4)
    assert explained(model, tokens) == pytest.approx(found["loud"], abs=1e-6)
    assert (layer.self_attn.scales == 1).all() and window.window == 16
    said = capsys.readouterr().out
    assert f"| all | {100 * found['memory'][0]:.1f}% |" in said


def test_answers_count_when_all_their_tokens_are_right(folder: Path) -> None:
    class Sure:
        """Says of each token that the same comes next, with confidence."""

        def hidden(self, tokens: Any) -> Any:
            return F.one_hot(tokens, 256).float() * 50, None

        def head(self, h: Any) -> Any:
            return h

    tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
    labels = torch.tensor([[IGNORE, 2, 3], [IGNORE, 2, 9]])
    found = answered(Sure(), tokens, labels)
    assert (found["tokens"], found["answers"]) == (0.75, 0.5)
    assert found["nats"] == pytest.approx(50 / 4)


def test_evaluate(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained memory is the window; a control with a say is not."""
    for module in (costs, evaluate):
        monkeypatch.setattr(module, "in_a_process", lambda run, *args: run(*args))
    convert("made")
    convert("other", "--scale_init", "1.0")
    capsys.readouterr()
    text = ["--text", "a/*.txt", "--text", "b/*.txt", "--held_out", "0.3", "--length", "64"]
    ask = ["--kinds", "passkey", "--lengths", "400", "--depths", "2", "--samples", "2"]
    also = [
        "--stream",
        "60",
        "--costs",
        "40",
        "--control",
        "loud=other",
        "--out",
        "found",
        "--threads",
        "1",
        "--batch_size",
        "2",
    ]
    assert main(["evaluate", "made", *text, *ask, *also]) == 0
    said = capsys.readouterr().out
    found = json.loads(Path("found/evaluation.json").read_text())
    assert {*found["digest"]} == {"memory", "loud", "text"}
    assert len({*found["digest"].values()}) == 3
    for part in found["positions"].values():
        nats = part["ranges"]["past 32"]["nats"]
        assert nats["memory"] == nats["window"] != nats["full"] and nats["loud"] != nats["window"]
        inside = part["ranges"]["inside"]
        assert inside["nats"]["window"] == pytest.approx(inside["nats"]["full"])
        assert inside["drift"]["memory"]["value"] == pytest.approx(0, abs=1e-6)
        assert inside["drift"]["loud"]["value"] != pytest.approx(0, abs=1e-4)
        share = part["ranges"]["past 32"]
        assert share["recovered"]["memory"]["value"] == 0
        loud = share["recovered"]["loud"]
        assert loud["value"] != 0 and share["beyond"] == {
            "loud": pytest.approx({"value": -loud["value"], "half": loud["half"]})
        }
        assert f"{100 * loud['value']:.1f}% ±{100 * loud['half']:.1f} |" in said
        assert len(part["by_position"]["loud"]) == 64
    arms = {(row["arm"], row["depth"]): row["nats"] for row in found["retrieval"]}
    assert len(arms) == 8 and arms["memory", 0.0] == arms["window", 0.0]
    full, window, memory = found["costs"]
    assert window["prefill_flops"] < full["prefill_flops"] < 2 * memory["prefill_flops"]
    assert full["cache_bytes"] == 2 * (8 + 4 * 2 * 40 * 8)
    assert window["cache_bytes"] == 2 * (8 + 4 * 2 * 17 * 8) < memory["cache_bytes"]
    assert found["stream"][-1]["tokens"] == 60
    sizes = {point["state"] for point in found["stream"] if point["tokens"] > 20}
    assert len(sizes) == 1 and "CPU ms/token" in said
    assert said.rstrip().endswith(Path("found/evaluation.md").read_text().rstrip())
    assert "| past window |" in said and "memory less loud" in said and "| passkey, 400 |" in said
    assert f"({arms['full', 0.0]:.2f}) |" in said  # of the needle that is out of the window
    assert Path("found/evaluation.png").stat().st_size > 1000


def test_every_number_of_the_harness_is_kept_and_nothing_is_dropped_in_silence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = {"acc,none": 0.5, "exact_match,none": np.float64(0.75), "f1,none": np.float32(0.25)}
    figures |= {"mcc,none": torch.tensor(1.0), "n,none": np.int64(3), "alias": "mine"}
    figures |= {"acc_stderr,none": "N/A", "perplexity,none": math.inf}
    kept = numbers("mine", {**figures, "bleu,none": [1, 2], "new,none": True})
    assert kept == {
        **{"acc,none": 0.5, "exact_match,none": 0.75, "f1,none": 0.25, "mcc,none": 1.0},
        **{"n,none": 3.0, "perplexity,none": math.inf},
    }
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "mine: bleu,none: left out, as it is no number: [1, 2]",
        "mine: new,none: left out, as it is no number: True",
    ]


def test_the_page_tells_filters_of_a_metric_apart_and_has_a_row_for_each() -> None:
    arm = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1}
    arm |= {"exact_match,flexible-extract": 0.75, "acc,none": math.nan}
    rows = harness_table({"full": {"mine": arm}, "memory": {"mine": {"acc,none": 1.0}}})
    assert rows.splitlines()[2:] == [
        "| mine exact_match,strict-match | 0.5000 | nan |",
        "| mine exact_match,flexible-extract | 0.7500 | nan |",
        "| mine acc | nan | 1.0000 |",
    ]


def test_the_page_of_a_model_that_is_lost(tmp_path: Path) -> None:
    lost = {"full": np.ones((2, 300)), "window": np.full((2, 300), np.inf)}
    by_arm = {**lost, "memory": np.full((2, 300), np.nan)}
    part = {"files": 2, **evaluate.compared(by_arm, 8, 300)}
    text = page({"window": 8, "positions": {"*.py": part}}, tmp_path)
    assert "| inside | 1.000 | inf | nan |" in text and "| past window | nan% ±nan |" in text
    assert (tmp_path / "evaluation.png").stat().st_size > 1000


def test_losses_in_float64_are_not_narrowed() -> None:
    class Even(torch.nn.Module):
        """Logits that differ by less than float32 can say."""

        def hidden(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.zeros(*tokens.shape, 2, dtype=torch.float64), None

        def head(self, h: torch.Tensor) -> torch.Tensor:
            return h + torch.tensor([0.0, 1e-12], dtype=torch.float64)

    tokens, want = torch.zeros(1, 4, dtype=torch.int64), pytest.approx(np.log(2) + 5e-13, 1e-14)
    assert losses(Even(), tokens) == want
    assert answered(Even(), tokens, tokens)["nats"] == want


class Few:
    """An index of the tasks of a harness that has none but the user's."""

    def __init__(self, include_path: str, include_defaults: bool = True) -> None:
        self.all_tasks = [path.stem for path in Path(include_path).glob("*.yaml")]


def test_the_harness_runs_local_tasks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("lm_eval")
    convert("made")
    Path("tasks").mkdir()
    rows = [
        {"question": f"line {n} of", "choices": [" a", " b"], "answer": n % 2} for n in range(4)
    ]
    Path("tasks/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("tasks/choice.yaml").write_text(
        f"task: choice\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/tasks/rows.jsonl}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    where = ["--include", "tasks", "--out", "found", "--threads", "1"]
    assert main(["evaluate", "made", "--tasks", "choice", *where]) == 0
    found = json.loads(Path("found/evaluation.json").read_text())["harness"]
    model = load("made")
    right = []
    for row in rows:
        tokens = torch.tensor([list(row["question"].encode())])
        encode = Tokenizer("made").encode
        scores = []
        for choice in row["choices"]:
            whole = torch.tensor([encode([(row["question"] + choice).encode()])[0].tolist()])
            tokens = whole[:, len(row["question"]) :]
            with torch.no_grad(), mode(model, "full"):
                logits = model(whole[:, :-1]).logits[:, -tokens.shape[1] :].log_softmax(-1)
            scores.append(float(logits.gather(-1, tokens[..., None]).sum()))
        right.append(scores.index(max(scores)) == row["answer"])
    assert found["full"]["choice"]["acc,none"] == np.mean(right)
    assert found["memory"]["choice"] == found["window"]["choice"]
    capsys.readouterr()
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)  # its index of all takes a minute
    assert main(["evaluate", "made", "--tasks", "choise", *where]) == 2
    assert "--tasks choise: no such task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source", "--batch_size", "0"], "--batch_size: must be at least 1, got 0"),
        (["source", "--device", "gpu"], "unknown device 'gpu'"),
        (["source"], "asks for nothing; give --text, --costs, --stream or --tasks"),
        (["source", "--kinds", "passkey"], "--kinds needs --text"),
        (["source", "--probe"], "--probe needs --text"),
        (["nowhere", "--costs", "64"], "nowhere: no config.json in it"),
        (["source", "--control", "x"], "expected NAME=DIR, got 'x'"),
        (["source", "--costs", "many"], "expected integers, as in 1,2, got 'many'"),
        (["source", "--text", "a/*.txt", "--length", "20"], "source: a 'llama' model; `layerzoo"),
    ],
)
def test_what_evaluate_refuses(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words, "--out", "found"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
