"""Text as tokens and from datasets, with the extras that they need, and without them."""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data import Text, corpus
from layerzoo.data import tokenizer as module
from layerzoo.data.task import IGNORE, SPLITS
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.metrics import LossByPosition, TokenLoss
from layerzoo.model import ModelConfig
from layerzoo.train.lit import LitModel

from .extras import need

WORDS = ["the", "of", "memory", "window", "é", "state", "日本", "forgets", "a", "token\n", "keys"]
FILES = ["*.txt"]


def document(n: int) -> str:
    """A text of its own, the same everywhere."""
    return f"{n}: " + " ".join(WORDS[n * k * k % len(WORDS)] for k in range(1, 90))


DOCUMENTS = [document(n) for n in range(12)]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n, text in enumerate(DOCUMENTS):
        Path(f"{n:02}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def bpe() -> str:
    """A tokenizer whose file asks for special tokens, truncation and padding."""
    tokenizers = need("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        DOCUMENTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            initial_alphabet=byte_level.alphabet(),
            special_tokens=["<end>"],
        ),
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save("tokenizer.json")
    return "tokenizer.json"


def jsonl(path: str, texts: list[Any], column: str = "text") -> str:
    Path(path).parent.mkdir(exist_ok=True)
    lines = (json.dumps({"id": n, column: text}) for n, text in enumerate(texts))
    Path(path).write_text("\n".join(lines))
    return path


def texts(task: Text) -> dict[str, list[str]]:
    """The documents of each split of a task of bytes."""
    task.setup()
    return {
        split: [bytes(part).decode() for part in np.split(c.tokens, c.starts[1:])]
        for split, c in task._corpus.items()
    }


# Bytes


def test_samples_of_bytes_are_the_same_on_every_machine() -> None:
    # A golden value: a change of it changes what a seed means.
    digest = hashlib.sha256()
    task = Text(files=FILES, length=40, documents=True, held_out=0.2)
    for split in SPLITS:
        for _, array in sorted(task.sample(split, np.arange(20)).items()):
            digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "7ce42d6e705b4cc6"


def test_one_document_is_cut_for_the_splits_that_are_missing() -> None:
    whole = corpus.distinct([bytes(range(100))])
    for missing, sizes in {("val", "test"): [80, 10, 10], ("test",): [90, 10]}.items():
        parts = corpus.deal(whole, 0.1, [*missing])
        assert [*parts] == ["train", *missing]
        pieces = [text for part in parts.values() for _, text in part]
        assert [len(text) for text in pieces] == sizes
        assert b"".join(pieces) == bytes(range(100))


def test_lengths_share_one_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = corpus.read_files
    monkeypatch.setattr(corpus, "read_files", lambda files: reads.append(files) or read(files))
    task = Text(files=FILES, length=16, lengths="8,32")
    parts = task.parts("test")
    for part, length in zip(parts.values(), (8, 32), strict=True):
        assert part.batch("test", [0, 1])["tokens"].shape == (2, length)
    assert task.batch("test", [0])["tokens"].shape == (1, 16)
    assert len(reads) == 1
    with pytest.raises(SpecError, match=r"the train split has .* a sample needs 100001"):
        task.varied(length=100_000).setup()  # although the corpus is there
    other = task.varied(held_out=0.3)
    other.setup()
    assert len(reads) == 2 and len(other._corpus["val"].starts) > len(task._corpus["val"].starts)


def test_the_standard_library_can_be_mixed_with_other_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("lib/email").mkdir(parents=True)
    Path("lib/site-packages").mkdir()
    for name in ("abc.py", "email/parser.py", "site-packages/no.py"):
        Path("lib", name).write_text(f"library's {name}")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: {"stdlib": "lib"}[name])
    library = corpus.distinct(
        f"library's {name}".encode() for name in ("abc.py", "email/parser.py")
    )
    assert corpus.read_files(None) == corpus.read_files(["stdlib"]) == library
    Path("abc.py").write_text("ours")
    Path("stdlib").write_text("a file of that name")
    ours = corpus.distinct([b"ours", DOCUMENTS[0].encode()])
    for files in (["stdlib", "00.txt", "*.py"], ["*.py", "00.txt", "stdlib"]):
        assert corpus.read_files(files) == library | ours
    assert [*corpus.read_files(["./stdlib"]).values()] == [b"a file of that name"]
    assert [*corpus.read_files(["*.py"]).values()] == [b"ours"]


# Tokens


def test_tokens_are_the_text_and_nothing_else(bpe: str) -> None:
    task = Text(files=FILES, length=16, tokenizer=bpe)
    task.setup()
    plain = texts(Text(files=FILES))
    tokenizer = need("tokenizers").Tokenizer.from_file(bpe)
    assert task.vocab_size == tokenizer.get_vocab_size() == 300
    for split, (tokens, starts, size) in task._corpus.items():
        assert tokens.dtype == np.uint16
        parts = [part.tolist() for part in np.split(tokens, starts[1:])]
        assert tokenizer.decode_batch(parts, skip_special_tokens=False) == plain[split]
        assert size == sum(len(text.encode()) for text in plain[split])
        assert len(tokens) < size / 2  # they are merged
    batch = task.batch("train", range(8))
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_first_tokens_of_documents_are_not_scored(bpe: str) -> None:
    task = Text(files=FILES, length=80, documents=True, tokenizer=bpe)
    tokenizer = need("tokenizers").Tokenizer.from_file(bpe)
    batch = task.batch("train", range(16))
    crossings = 0
    for tokens, labels, ids in zip(
        batch["tokens"], batch["labels"], batch["documents"], strict=True
    ):
        ends = (ids[1:] != ids[:-1]).nonzero().flatten()
        crossings += len(ends)
        assert (labels[:-1] == IGNORE).nonzero().flatten().tolist() == ends.tolist()
        for end in ends[ends < 70]:  # each begins with its number and a colon
            text = tokenizer.decode(tokens[end + 1 : end + 8].tolist())
            assert text[:4].split(": ")[0] in map(str, range(12))
    assert crossings >= 8


def test_bits_a_byte_count_the_bytes_of_the_held_out_text(bpe: str) -> None:
    for name, task in {
        "bytes": Text(files=FILES, length=16),
        "tokens": Text(files=FILES, length=16, tokenizer=bpe),
    }.items():
        loss, by_position = task.metrics()
        assert isinstance(loss, TokenLoss) and isinstance(by_position, LossByPosition)
        want, plain = 1.0, texts(Text(files=FILES))
        if name == "tokens":
            held_out = "".join(plain["val"] + plain["test"])
            tokenizer = Tokenizer(bpe)
            want = len(held_out.encode()) / sum(
                len(c.tokens) for s, c in task._corpus.items() if s != "train"
            )
            assert want == pytest.approx(
                len(held_out.encode()) / len(tokenizer.encode([held_out.encode()])[0]), rel=0.02
            )
        assert loss.bytes_per_token == by_position.bytes_per_token == want


def test_long_documents_are_encoded_in_pieces(bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(bpe)
    documents = [b"one line\n" * 9 + b"x" * 50, b"", b"short", b"a\xffb"]
    whole = tokenizer.encode(documents)
    assert [len(tokens) > 0 for tokens in whole] == [True, False, True, True]
    monkeypatch.setattr(module, "BATCH", 7)
    for one, again in zip(whole, tokenizer.encode(documents), strict=True):
        assert one.tolist() == again.tolist() and one.dtype == again.dtype
    monkeypatch.setattr(module, "PIECE", 20)
    assert [*module._pieces(documents[0])] == [b"one line\n" * 2] * 4 + [
        b"one line\n",
        b"x" * 20,
        b"x" * 20,
        b"x" * 10,
    ]
    pieces = tokenizer.encode(documents)
    assert [tokenizer.tokenizer.decode(tokens.tolist()) for tokens in pieces] == [
        text.decode(errors="replace") for text in documents
    ]
    want = np.concatenate(tokenizer.encode([*module._pieces(documents[0])]))
    assert pieces[0].tolist() == want.tolist()


def test_loader_processes_yield_the_same_batches_in_silence(
    bpe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    task = Text(
        files=FILES, length=16, tokenizer=bpe, batch_size=4, train_samples=16, num_workers=2
    )
    task.setup()
    for n, batch in enumerate(task.train_dataloader()):
        assert torch.equal(batch["tokens"], task.batch("train", range(4 * n, 4 * n + 4))["tokens"])
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_tokenizer_is_a_file_a_folder_or_an_id(
    bpe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("folder").mkdir()
    Path("folder/tokenizer.json").write_bytes(Path(bpe).read_bytes())
    hub = need("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *what: asked.append(what) or bpe)
    for where in ("tokenizer.json", "folder", "someone/model"):
        assert Tokenizer(where).vocab_size == 300
    assert asked == [("someone/model", "tokenizer.json")]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no.json", "there is no file 'no.json'"),
        ("empty", "folder 'empty' holds no tokenizer.json"),
        ("00.txt", "'00.txt' is no tokenizer.json: "),
        ("raw", "'raw' is no tokenizer.json: it is not UTF-8"),
        ("{}.json", "'{}.json' is no tokenizer.json: Model missing"),
        ("bare.json", "'bare.json' has no tokens"),
        (
            "a bad id",
            "'a bad id' is no file or folder here, nor to be had from Hugging Face: Repo",
        ),
        ("away", "'away' is no file or folder here, nor to be had from Hugging Face: no network"),
    ],
)
def test_a_wrong_tokenizer_is_one_line(
    where: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers, hub = need("tokenizers"), need("huggingface_hub")
    Path("empty").mkdir()
    Path("raw").write_bytes(b"\xff\xfe")
    Path("{}.json").write_text("{}")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save("bare.json")

    if where == "away":

        def fail(*what: str) -> str:
            raise hub.errors.LocalEntryNotFoundError("no network\nat all")

        monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(SpecError) as error:
        Text(files=FILES, tokenizer=where)
    assert str(error.value).startswith(f"data: Text: tokenizer: {message}")
    assert "\n" not in str(error.value)


# Datasets


def test_a_dataset_with_splits_of_its_own() -> None:
    need("datasets")
    for split, part in {
        "train": slice(6),
        "validation": slice(6, 9),
        "test": slice(9, 12),
    }.items():
        jsonl(f"data/{split}.jsonl", DOCUMENTS[part])
    found = texts(Text(dataset="data", length=16))
    assert {split: sorted(texts) for split, texts in found.items()} == {
        **{"train": sorted(DOCUMENTS[:6]), "val": sorted(DOCUMENTS[6:9])},
        "test": sorted(DOCUMENTS[9:]),
    }


def test_splits_that_a_dataset_lacks_are_dealt_from_train() -> None:
    need("datasets")
    jsonl("data/train.jsonl", [*DOCUMENTS[:6], None, "", *DOCUMENTS[6:10]])
    jsonl("data/test.jsonl", DOCUMENTS[10:])
    found = texts(Text(dataset="data", length=16, held_out=0.2))
    assert sorted(found["test"]) == sorted(DOCUMENTS[10:])
    assert len(found["val"]) == 2 and len(found["train"]) == 8
    assert sorted(found["val"] + found["train"]) == sorted(DOCUMENTS[:10])


def test_a_dataset_is_a_file_and_its_text_in_a_column() -> None:
    datasets = need("datasets")
    jsonl("one.jsonl", DOCUMENTS, "body")
    jsonl("other.jsonl", DOCUMENTS[::-1], "body")
    datasets.Dataset.from_dict({"body": DOCUMENTS}).to_parquet("one.parquet")
    lines, parquet = (
        texts(Text(dataset=name, column="body", length=16, held_out=0.2))
        for name in ("one.jsonl", "one.parquet")
    )
    assert lines == parquet  # and not other.jsonl's
    assert sorted(chain(*lines.values())) == sorted(DOCUMENTS)
    assert [len(lines[split]) for split in SPLITS] == [8, 2, 2]


def test_a_subset_of_a_dataset() -> None:
    need("datasets")
    jsonl("data/one.jsonl", DOCUMENTS[:6])
    jsonl("data/two.jsonl", DOCUMENTS[6:])
    configs = "\n".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl" for name in ("one", "two")
    )
    Path("data/README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    found = texts(Text(dataset="data", subset="two", length=16))
    assert sorted(chain(*found.values())) == sorted(DOCUMENTS[6:])
    with pytest.raises(SpecError, match=r"dataset: 'data' cannot be read: .*'three' not found"):
        Text(dataset="data", subset="three").setup()


def test_no_more_is_read_of_a_dataset_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter([{"text": "é" * 20}] * 100)
    asked: dict[str, Any] = {}

    def load(*where: Any, **how: Any) -> dict[str, Any]:
        asked.update(how)
        return {"train": rows, "validation": [{"text": "abc"}], "test": [{"text": "de"}]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    task = Text(dataset="someone/data", max_bytes=101, length=1)
    task.setup()
    assert asked["streaming"]
    assert [task._corpus[split].bytes for split in SPLITS] == [40, 3, 2]  # equal ones are one
    assert len([*rows]) == 97  # the third reaches it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "./no/where"}, "dataset: './no/where' is no file or folder here, nor to be"),
        ({"dataset": "00.bin"}, "dataset: '00.bin' cannot be read: Unable to find"),
        ({"dataset": "bad.jsonl"}, "dataset: 'bad.jsonl' cannot be read: JSON parse error"),
        ({"dataset": "held_out"}, "dataset: 'held_out' has no split 'train', but test"),
        ({"dataset": "t.jsonl", "column": "texd"}, "column: the dataset has no 'texd'; did you"),
        ({"dataset": "t.jsonl", "column": "id"}, "column: 'id' holds int, not text"),
        ({"dataset": "t.jsonl", "length": 9999}, "dataset: the train split has "),
    ],
)
def test_a_wrong_dataset_is_one_line(options: dict[str, Any], message: str) -> None:
    need("datasets")
    Path("00.bin").write_bytes(b"\0")
    Path("bad.jsonl").write_text('{"text": "a"}\n{no json\n')
    jsonl("held_out/test.jsonl", DOCUMENTS)
    jsonl("t.jsonl", DOCUMENTS)
    with pytest.raises(SpecError) as error:
        Text(**options).setup()
    assert str(error.value).startswith(f"data: Text: {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": FILES, "dataset": "a"}, "dataset: the text is from files or from a dataset"),
        ({"subset": "a"}, "subset: 'a' is of no dataset"),
        ({"max_bytes": 0}, "max_bytes: must be at least 1, got 0"),
        ({"held_out": 0.5}, "held_out: must be in"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"^data: Text: {message}"):
        Text(**options)


# The extra


def test_a_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizers", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    needs = "needs the {0} extra: pip install 'layerzoo[{0}]'".format
    with pytest.raises(SpecError) as error:
        Text(tokenizer="any")
    assert str(error.value) == f"data: Text: tokenizer: {needs('hf')}"
    with pytest.raises(SpecError) as error:
        Text(dataset="any").setup()
    assert str(error.value) == f"data: Text: dataset: {needs('eval')}"
    options = ("--data", "Text", "--data.tokenizer", "any", "--data.files", "['*.txt']")
    assert main(["fit", "--config", "text", *options]) == 2
    assert capsys.readouterr().err.count(needs("hf")) == 1
    Text(files=FILES).setup()  # which needs none


def test_another_module_that_is_missing_is_not_taken_for_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("broken.py").write_text("import not_there")
    monkeypatch.syspath_prepend(".")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        module.extra("broken")


# layerzoo generate


def checkpoint(vocab_size: int) -> str:
    network = {"vocab_size": vocab_size, "dim": 16, "layers": ["sliding"]}
    lit = LitModel(network=ModelConfig.from_fields(network))
    content = {"state_dict": lit.state_dict(), "hyper_parameters": dict(lit.hparams)}
    torch.save(content, "model.ckpt")
    return "model.ckpt"


def test_generate_reads_and_writes_with_a_tokenizer(
    bpe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tokenizer = checkpoint(304), Tokenizer(bpe)  # a vocabulary may be padded
    prompt = "the memory é 日本"
    ids = tokenizer.encode([prompt.encode()])[0].tolist()
    greedy = ("--temperature", "0", "--max_new_tokens", "12")

    def says(*argv: str) -> str:
        assert main(["generate", path, *argv, *greedy]) == 0
        return capsys.readouterr().out

    whole = [*map(int, says("--tokens", " ".join(map(str, ids))).split())]
    assert whole[: len(ids)] == ids and len(whole) == len(ids) + 12
    text = tokenizer.tokenizer.decode(whole, skip_special_tokens=False)
    out = says("--prompt", prompt, "--tokenizer", bpe)
    assert out.startswith(prompt) and out.endswith("\n")
    assert text.rstrip("\ufffd") == out[:-1].rstrip("\ufffd")  # an unfinished character waits
    Path("prompt").write_text(prompt, encoding="utf-8")
    assert says("--prompt_file", "prompt", "--tokenizer", bpe) == out.removeprefix(prompt)
    assert says("--tokens", " ".join(map(str, ids)), "--tokenizer", bpe) == out


def test_text_of_tokens_is_printed_when_a_character_is_whole(
    bpe: str,
) -> None:
    tokenizer = Tokenizer(bpe)
    decode = tokenizer.decoder()
    ids = tokenizer.encode(["a€b".encode()])[0].tolist()  # € is no token of this vocabulary
    assert [decode([token]) for token in ids] == ["a", "", "", "€", "b"]
    assert decode(tokenizer.encode([b"<end>"])[0].tolist()) == "<end>"


def test_generate_refuses_a_tokenizer_of_another_model(
    bpe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(299)
    for options, message in (
        (("--tokenizer", bpe), "--tokenizer tokenizer.json: has 300 tokens, the model 299; give"),
        (("--tokenizer", "no.json"), "--tokenizer: there is no file 'no.json'"),
        ((), "--prompt: the model has 299 tokens, not bytes; use --tokens or --tokenizer"),
    ):
        assert main(["generate", path, "--prompt", "a", *options]) == 2
        assert f"layerzoo: error: {message}" in capsys.readouterr().err
