"""Questions in real text: they are put where they should be, and only the needle answers them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional as F

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data import RecallText, Text, questions
from layerzoo.data.questions import CITIES, DIGITS, DRAWS, FACTS, KINDS, NAMES, PAIRS, Question
from layerzoo.data.random import U64, bits, choose
from layerzoo.data.retrieval import chance, draw, encode, grid, longest, plant
from layerzoo.data.task import IGNORE, SPLITS
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.metrics import MarkedAnswers

FILLER = ["\n".join(f"line {n} of a text" for n in range(k, k + 90)) for k in range(6)]
Make = Callable[..., Tokenizer]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n, text in enumerate(FILLER):
        Path(f"{n}.txt").write_text(text)


@pytest.fixture
def make() -> Make:
    """Trains tokenizers of bytes: `numbers` are split into digits, or merged; `spaces`: whether
    it splits text at spaces."""
    kinds = tokenizers.pre_tokenizers

    def make(numbers: str = "split", spaces: bool = True, texts: Any = None) -> Tokenizer:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        level = kinds.ByteLevel(add_prefix_space=False, use_regex=spaces)
        steps = [kinds.Digits(individual_digits=True)] if numbers == "split" else []
        tokenizer.pre_tokenizer = kinds.Sequence([*steps, level])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        words = [" ".join(("", *FACTS.values(), NAMES, CITIES, *FACTS))] * 3
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=900, show_progress=False, initial_alphabet=kinds.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(texts or words, trainer)
        tokenizer.save("tokenizer.json")
        return Tokenizer("tokenizer.json")

    return make


def random(count: int) -> U64:
    return bits(7, np.arange(count)[:, None], np.arange(DRAWS))


def asked(count: int, kind: str) -> list[Question]:
    return [draw(kind, own) for own in random(count)]


# Questions


def test_questions_are_the_same_on_every_machine() -> None:
    # A golden value: a change of it changes what a seed means.
    digest = hashlib.sha256()
    for kind in KINDS:
        digest.update(repr([tuple(question) for question in asked(20, kind)]).encode())
    assert digest.hexdigest()[:16] == "e3215430731fd47e"


def test_numbers_are_drawn_as_choose_draws_them() -> None:
    own = random(5)[:, :PAIRS]
    drawn = [questions._distinct(12, row.tolist()) for row in own]  # so few that they collide
    assert drawn == choose(12, PAIRS, own).tolist()
    assert any(
        row != (r % (12 - np.arange(PAIRS, dtype=np.uint64))).tolist()
        for row, r in zip(drawn, own, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stands_in_the_needle_alone(kind: str) -> None:
    for needle, question, answer in asked(200, kind):
        assert answer not in question
        lines = needle.splitlines()
        telling = [line for line in lines if answer in line]
        assert len(telling) == 1  # and in no other line of a block
        if kind == "passkey":
            assert telling[0].startswith(f"The pass key is {answer}.")
            continue
        start = question.rsplit("\n", 1)[1]  # the needle goes on as the question ends
        assert telling[0].startswith(f"{start} {answer}")
        assert sum(line.startswith(start) for line in lines) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_tells_nothing_of_the_answer(kind: str) -> None:
    """The best table from a part of the question to the answer (a number's last digit) guesses
    at chance."""
    found = asked(4000, kind)
    for part in (0, 1):
        tables: dict[str, Counter[str]] = {}
        right = []
        for n, (_, question, answer) in enumerate(found):
            key, last = _part(question, part), answer if kind == "needle" else answer[-1]
            table = tables.setdefault(key, Counter())
            if n < 2000:
                table[last] += 1
            else:
                right.append(table.most_common(1)[0][0] == last)
        guess = 1 / 16 if kind == "needle" else 1 / 10
        assert abs(np.mean(right) - guess) < 3 * (guess * (1 - guess) / len(right)) ** 0.5


def _part(question: str, part: int) -> str:
    """Of a made-up fact all but the name or all but the city, else a digit of the key."""
    if "{" in question:
        return question[-4 - part]
    for word in (NAMES, CITIES)[part].split():
        question = question.replace(word, "")
    return question


def test_facts_have_as_many_words_and_a_block_asks_for_any_line() -> None:
    lists = [words.split() for words in FACTS.values()]
    assert all(len({*words}) == len(words) == 16 for words in lists)
    lines = []
    for needle, question, _ in asked(400, "key_value"):
        block = needle.strip().splitlines()
        assert len(block) == PAIRS == len({line.split()[0] for line in block})
        lines += [n for n, line in enumerate(block) if line.split()[0] == question.split()[-1]]
    counts = np.bincount(lines)
    assert counts.sum() == 400 and len(counts) == PAIRS and counts.min() > 25
    with pytest.raises(SpecError, match=r"kinds: no 'pasky'; did you mean 'passkey'"):
        draw("pasky", random(1)[0])


# Tokens


@pytest.mark.parametrize("numbers", ["split", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_question_and_answer_are_the_tokens_of_their_text(
    kind: str, numbers: str, make: Make
) -> None:
    tokenizer = make(numbers)
    for question in asked(50, kind):
        needle, ask, answer = encode(question, tokenizer)
        decode = tokenizer.tokenizer.decode
        whole = f"{question.question} {question.answer}"
        assert tokenizer.encode([whole.encode()])[0].tolist() == [*ask, *answer]
        assert decode(needle) == question.needle
        assert decode(answer).strip() == question.answer
        if numbers == "split" and kind != "needle":
            assert len(answer) == DIGITS  # the space is the question's
        elif kind == "needle":
            assert decode(answer) == f" {question.answer}"


def test_a_tokenizer_that_joins_question_and_answer_is_refused(make: Make) -> None:
    texts = [f"{q.question} {q.answer}" for q in asked(1, "passkey")]
    tokenizer = make("merged", spaces=False, texts=texts * 9)
    with pytest.raises(SpecError, match=r"tokenizer: it joins the answer '\d{5}' to the question"):
        encode(asked(1, "passkey")[0], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_stands_at_its_depth_and_the_rest_is_the_text(kind: str, make: Make) -> None:
    tokenizer = make()
    text = np.full(401, 899, np.uint16)
    for own in random(20):
        needle, question, answer = encode(draw(kind, own), tokenizer)
        end = 401 - len(question) - len(answer)
        starts = {0: 0, 0.5: (end - len(needle)) / 2, 1: end - len(needle)}
        for depth, start in starts.items():
            tokens, labels = plant(text, tokenizer, kind, depth, own)
            assert tokens.shape == labels.shape == (400,)
            whole = np.append(tokens, labels[-1])
            at = int(start + 0.5)
            assert whole[at : at + len(needle)].tolist() == needle.tolist()
            assert whole[end:].tolist() == [*question, *answer]
            rest = np.concatenate([whole[:at], whole[at + len(needle) : end]])
            assert (rest == 899).all()
            where = np.flatnonzero(labels != IGNORE)
            assert where.tolist() == [*range(400 - len(answer), 400)]
            assert labels[where].tolist() == whole[where + 1].tolist() == answer.tolist()
    assert (text == 899).all()  # what was given is left as it was


def test_what_cannot_be_planted_is_one_line(make: Make) -> None:
    tokenizer, own = make(), random(1)[0]
    size = sum(map(len, encode(draw("passkey", own), tokenizer)))
    fits, _ = plant(np.zeros(size, np.uint16), tokenizer, "passkey", 0.3, own)
    assert len(fits) == size - 1
    for text, depth, message in (
        (size - 1, 0.3, f"length: a question of kind passkey takes {size} tokens and does not"),
        (size, 1.1, r"depth: must be in \[0, 1\], got 1.1"),
    ):
        with pytest.raises(SpecError, match=message):
            plant(np.zeros(text, np.uint16), tokenizer, "passkey", depth, own)


def test_a_grid_asks_the_same_at_each_depth(make: Make) -> None:
    tokenizer = make()
    corpus = np.random.default_rng(0).integers(0, 900, 3000).astype(np.uint16)
    depths = (0, 0.25, 1)
    batches = [*grid(corpus, tokenizer, "needle", 120, depths, 5, seed=3)]
    assert len(batches) == 3
    first, labels = batches[0]
    assert first.shape == labels.shape == (5, 120) and first.dtype == torch.int64
    size = longest("needle", tokenizer)
    for tokens, again in batches[1:]:
        assert torch.equal(again, labels)
        assert not torch.equal(tokens, first)
        assert (tokens == first).float().mean() > 1 - 2 * size / 120
    assert len({tuple(row.tolist()) for row in first}) == 5
    same, _ = next(grid(corpus, tokenizer, "needle", 120, (1,), 2, seed=3))
    assert torch.equal(same, batches[2][0][:2])  # of seed, sample and depth alone
    other, _ = next(grid(corpus, tokenizer, "needle", 120, (1,), 2, seed=4))
    assert not torch.equal(same[:, :60], other[:, :60])  # another text, too
    with pytest.raises(SpecError, match="the text has 3000 tokens, a sample needs 3001"):
        next(grid(corpus, tokenizer, "needle", 3000, (1,), 2))


def test_chance_is_that_of_the_best_guess(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "DIGITS", 3)  # or it takes seconds
    words = make()
    assert chance("passkey", words) == chance("key_value", words) == pytest.approx(0.1)
    assert chance("needle", words) == pytest.approx(1 / 16)
    letters = make(texts=["a"])  # words are spelled, and most letters follow from the first
    assert 0.5 < chance("needle", letters) < 0.9
    monkeypatch.setattr(questions, "FACTS", {"it is": "ab ac b"})
    assert chance("needle", letters) == 3 / 5  # of three first letters two, of two second one
    numbers = make("merged", texts=[" ".join(f"{n:03}" for n in range(1000))])
    assert 0.001 < chance("passkey", numbers) < 0.1


# The task


def task(make: Make, **options: Any) -> RecallText:
    make()
    small = {"files": ["*.txt"], "length": 400, "tokenizer": "tokenizer.json", "held_out": 0.2}
    return RecallText(**{**small, **options})


def test_other_samples_are_those_of_text(make: Make) -> None:
    for documents in (False, True):
        mixed = task(make, recall=0.3, documents=documents)
        plain = Text(
            files=["*.txt"],
            length=400,
            tokenizer="tokenizer.json",
            held_out=0.2,
            documents=documents,
        )
        for split in SPLITS:
            batch, text = mixed.batch(split, range(200)), plain.batch(split, range(200))
            rows = batch["answer"].any(1)
            assert 35 < rows.sum() < 85
            for name, value in text.items():
                assert torch.equal(batch[name][~rows], value[~rows]), name
            tokens, labels = batch["tokens"][rows], batch["labels"][rows]
            assert torch.equal(tokens[:, 1:], labels[:, :-1])  # all of them are scored
            if documents:
                assert (batch["documents"][rows] == 0).all()
            assert batch["answer"].dtype == torch.bool and batch["answer"][rows][:, -1].all()
    assert torch.equal(
        mixed.batch("val", [5])["tokens"], mixed.batch("val", range(9))["tokens"][5:6]
    )


def test_kinds_and_depths_are_spread(make: Make) -> None:
    mixed = task(make, recall=1)
    batch = mixed.batch("train", range(150))
    decode = Tokenizer("tokenizer.json").tokenizer.decode
    ends = ["What is the pass key?", "One of the lines of JSON above", ""]
    counts, places = [0, 0, 0], []
    for tokens, labels, answer in zip(
        batch["tokens"].tolist(), batch["labels"].tolist(), batch["answer"], strict=True
    ):
        text = decode([*tokens, labels[-1]])
        kind = next(n for n, end in enumerate(ends) if end in text)
        counts[kind] += 1
        told = decode(np.array(labels)[answer.numpy()].tolist()).strip()
        assert text.endswith(f" {told}")
        if kind == 0:
            assert text.count(told) == 3
            places.append(text.index(told) / len(text))
    assert min(counts) > 30
    assert min(places) < 0.15 and max(places) > 0.6
    only = task(make, recall=1, kinds=["needle"]).batch("test", range(20))
    assert not any("pass key" in decode(tokens) for tokens in only["tokens"].tolist())


def test_samples_of_questions_are_the_same_on_every_machine(make: Make) -> None:
    # Of bytes, so that it is not the tokenizer's training that is hashed.
    make(texts=["a"])
    mixed = RecallText(
        files=["*.txt"], length=700, recall=0.5, tokenizer="tokenizer.json", held_out=0.2
    )
    digest = hashlib.sha256()
    for split in SPLITS:
        for _, array in sorted(mixed.sample(split, np.arange(20)).items()):
            digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "400f31d4d292cba3"


def test_answers_are_measured_apart(make: Make) -> None:
    mixed = task(make, recall=0.5, kinds=["passkey"])
    batch = mixed.batch("val", range(12))
    logits = F.one_hot(batch["labels"], 900).float() * 50
    answers = batch["answer"]
    rows = answers.any(1).nonzero().flatten().tolist()
    assert {n + 1 for n in rows} & {*rows}  # two questions in neighbouring samples
    metric = mixed.metrics()[-1]
    assert isinstance(metric, MarkedAnswers)
    logits[rows[1], -1] = 0  # one wrong token
    logits[rows[1], -1, 5] = 50
    logits[~answers] = 0  # and all that is no answer
    metric.update(logits.flatten(0, 1), batch["labels"].flatten(), answer=answers.flatten())
    figures = {name: float(value) for name, value in metric.compute().items()}
    count = DIGITS * len(rows)
    assert int(answers.sum()) == count
    assert figures["recall/accuracy"] == pytest.approx(1 - 1 / count)
    assert figures["recall/answers"] == pytest.approx(1 - 1 / len(rows))
    assert figures["recall/loss"] == pytest.approx(50 / count)
    metric.reset()
    metric.update(logits[0], batch["labels"][0], answer=torch.zeros(400, dtype=torch.bool))
    assert metric.compute() == {}


def test_bits_a_byte_are_of_text_alone(make: Make) -> None:
    for recall, there in ((0.0, True), (0.2, False)):
        loss = task(make, recall=recall).metrics()[0]
        loss.update(torch.zeros(3, 900), torch.zeros(3, dtype=torch.int64))
        assert ("loss/bits_per_byte" in loss.compute()) == there
    assert not task(make, recall=0, length=20).batch("train", range(20))["answer"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": ""}, "tokenizer: its questions are of tokens; give one"),
        ({"tokenizer": None}, "tokenizer: expected str, got None: its questions are of tokens"),
        ({"recall": 1.5}, r"recall: must be in \[0, 1\], got 1.5"),
        ({"kinds": []}, "kinds: give some of passkey, needle, key_value, or leave it out"),
        ({"kinds": ["need"]}, "kinds: no 'need'; did you mean 'needle'"),
        ({"length": 60}, r"length: a question of kind passkey takes some \d+ tokens, and as"),
        ({"lengths": "500,60"}, r"length: a question of kind passkey takes some \d+ tokens, and"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(SpecError, match=f"^data: RecallText: {message}") as error:
        task(make, **options).parts("test")
    assert "\n" not in str(error.value)


def test_it_trains_from_the_command_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    Path("run.yaml").write_text(
        "data:\n"
        "  class_path: RecallText\n"
        "  init_args: {files: ['*.txt'], length: 400, tokenizer: tokenizer.json, held_out: 0.2,\n"
        "    recall: 0.5, batch_size: 4, val_samples: 8, train_samples: 8}\n"
        "model:\n"
        "  network: {vocab_size: 900, dim: 8, depth: 1, layers: [{name: sliding, window: 4}]}\n"
        "trainer: {max_steps: 1, num_sanity_val_steps: 0, enable_progress_bar: false,\n"
        "  log_every_n_steps: 1, val_check_interval: 1}\n"
    )
    assert main(["fit", "--config", "run.yaml"]) == 0
    (path,) = Path().rglob("*.ckpt")
    assert main(["validate", "--config", "run.yaml", "--ckpt_path", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("recall/accuracy", "recall/loss", "loss/held_out"))
    assert "bits_per_byte" not in out
