"""A split of text depends on what the files hold, and on nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerzoo.data import Continual, Text
from layerzoo.data.task import SPLITS
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.tools.evaluate.positions import held_out

from .extras import need

WORDS = ["memory", "of", "the", "window", "forgets", "a", "key", "state", "token"]


def document(n: int) -> str:
    draw = random.Random(n)
    return f"{n}: " + " ".join(draw.choices(WORDS, k=40))


DOCUMENTS = [document(n) for n in range(12)]


def write(folder: str, texts: list[str]) -> None:
    Path(folder).mkdir(parents=True)
    for n, text in enumerate(texts):
        Path(folder, f"{n:02}.txt").write_text(text)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("data", DOCUMENTS)


def split(**options: Any) -> dict[str, str]:
    """The text of each split, the digest, and what samples of it are."""
    task = Text(**{"length": 16, "held_out": 0.2, **options})
    found = {name: bytes(task.tokens(name)).decode() for name in SPLITS}
    sample = task.sample("train", np.arange(3))["tokens"].tolist()
    return {**found, "digest": json.dumps(task.digest()), "sample": str(sample)}


def test_a_split_does_not_depend_on_paths_order_or_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = split(files=["data/*.txt"])
    assert {name: len(expected[name].split(": ")) - 1 for name in SPLITS} == {
        **{"train": 8, "val": 2, "test": 2},
    }
    shutil.copytree("data", "other/folder")
    Path("linked").symlink_to("data")
    write("renamed", random.Random(0).sample(DOCUMENTS, 12))
    monkeypatch.setenv("HOME", str(tmp_path))
    names = sorted(str(path) for path in Path("data").iterdir())
    for files in (
        ["./data/*.txt"],
        ["data/../data/*.txt"],
        [str(tmp_path / "data" / "*.txt")],
        ["~/data/*.txt"],
        ["other/folder/*.txt"],
        ["linked/*.txt"],
        ["renamed/*.txt"],
        names,
        names[::-1],
        ["data/*.txt", "data/0*.txt", "./data/**/*"],
        ["data/*.txt", "other/folder/*.txt", "linked/0*.txt"],
    ):
        assert split(files=files) == expected, files
    monkeypatch.chdir("other")
    assert split(files=["folder/*.txt"]) == split(files=["../data/*"]) == expected


@pytest.mark.parametrize("count", [1, 2])
def test_few_files_are_cut_in_the_order_of_their_contents(count: int) -> None:
    write("few", DOCUMENTS[:count])
    expected = split(files=["few/*"], length=8)
    assert sum(len(expected[name]) for name in SPLITS) == sum(map(len, DOCUMENTS[:count]))
    write("again", DOCUMENTS[:count][::-1])
    for files in (["again/*"], ["again/*", "few/*"], ["./few/00.txt", "few/*"]):
        assert split(files=files, length=8) == expected


def test_rows_of_a_dataset_count_once_and_in_any_order() -> None:
    need("datasets")

    def rows(folder: str, **splits: list[str]) -> str:
        Path(folder).mkdir()
        for name, texts in splits.items():
            lines = (json.dumps({"text": text}) for text in texts)
            Path(folder, f"{name}.jsonl").write_text("\n".join(lines))
        return folder

    dealt = split(dataset=rows("one", train=DOCUMENTS))
    assert dealt == split(dataset=rows("two", train=[*DOCUMENTS[::-1], *DOCUMENTS[:3]]))
    published = split(dataset=rows("three", train=DOCUMENTS[:8], test=DOCUMENTS[8:]))
    other = split(dataset=rows("four", train=DOCUMENTS[7::-1], test=DOCUMENTS[:7:-1]))
    assert published == other and published["digest"] != dealt["digest"]
    assert sorted(published["test"]) == sorted("".join(DOCUMENTS[8:]))


def test_held_out_text_of_an_evaluation_is_none_that_a_run_was_trained_on() -> None:
    tokenizers = need("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save("tokenizer.json")
    tokenizer = Tokenizer("tokenizer.json")
    shutil.copytree("data", "copied")
    Path("one").mkdir()
    Path("one/whole.txt").write_text("".join(DOCUMENTS))
    for files, patterns in (  # whole files under other names, and the tail of one that is cut
        (["data/*.txt"], ["./copied/*.txt"]),
        (["one/*.txt"], ["one/whole.txt"]),
    ):
        trained = split(files=files, length=16)["train"]
        ((_, found),) = held_out(patterns, 0.2, 60, 9, tokenizer).items()
        text = Text(files=files, length=16, held_out=0.2, tokenizer="tokenizer.json")
        kept = tokenizer.encode([trained.encode()])[0].tolist()
        assert found and text.tokens("train").tolist() == kept
        for row in found:
            assert str(row.tolist())[1:-1] not in str(kept)


# Digests


def test_a_digest_is_of_contents_never_of_names_and_never_stale() -> None:
    def digest(**options: Any) -> dict[str, str]:
        return Text(files=["data/*.txt"], length=16, **options).digest()

    first = digest()
    assert [*first] == ["files"] and len(first["files"]) == 64
    assert digest(seed=1, batch_size=2, held_out=0.3) == first
    shutil.copytree("data", "copy")
    assert Text(files=["copy/*"], length=99).digest() == first
    path = Path("data/03.txt")
    before = path.stat()
    path.write_text(DOCUMENTS[3][:-1] + "!")  # the same size, and the same time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = digest()
    assert changed != first
    path.write_text(DOCUMENTS[3])
    assert digest() == first


def test_a_digest_is_of_what_a_task_has_read() -> None:
    for read in (Text.setup, Text.digest):
        task = Text(files=["data/*.txt"], length=16)
        read(task)
        digest, text = task.digest(), Text(files=["data/*.txt"], length=16).tokens("train")
        Path("data/00.txt").write_text("something else that came later")
        for same in (task, task.varied(length=8), task.varied(shuffled=False)):
            assert same.digest() == digest
            assert np.array_equal(same.tokens("train"), text)
        assert task.varied(held_out=0.3).digest() != digest  # which reads anew
        Path("data/00.txt").write_text(DOCUMENTS[0])


def test_a_task_of_tasks_has_the_digests_of_all() -> None:
    one, other = Text(files=["data/*.txt"], length=16), Text(files=["data/0*.txt"], length=16)
    assert Continual(tasks=[one, other]).digest() == {
        "tasks.1.files": one.digest()["files"],
        "tasks.2.files": other.digest()["files"],
    }
    assert [*Continual(tasks=[one, other], only=2).digest()] == ["tasks.2.files"]


def test_a_task_that_reads_a_tokenizer_says_which() -> None:
    tokenizers = need("tokenizers")

    def save(*words: str) -> None:
        vocab = {word: n for n, word in enumerate(words)}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save("t.json")

    def text() -> Text:
        return Text(files=["data/*.txt"], length=4, tokenizer="t.json")

    save("a", "memory")
    task = text()
    first = task.digest()
    assert [*first] == ["files", "tokenizer"] and text().digest() == first
    task.setup()
    save("a", "memory", "window")
    assert text().digest()["tokenizer"] != first["tokenizer"]
    # What shares the text that was encoded shares the tokenizer that encoded it.
    assert task.varied(length=8).vocab_size == 2 and task.varied(length=8).digest() == first
