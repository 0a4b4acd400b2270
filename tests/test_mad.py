"""The tasks of MAD: what their rows are, and that they can be trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
)
from layerzoo.data.task import IGNORE, SPLITS
from layerzoo.model import LanguageModel

BASELINE = {
    InContextRecall: (16, 128, 12_800),
    FuzzyRecall: (16, 128, 12_800),
    NoisyRecall: (32, 128, 12_800),
    SelectiveCopying: (16, 256, 12_800),
    Compression: (16, 32, 12_800),
    Memorization: (256, 32, 256),
}
ROWS = np.arange(200)


def test_defaults_are_the_published_baseline() -> None:
    for cls, (vocab_size, length, train) in BASELINE.items():
        task = cls()
        assert (task.vocab_size, task.length, task.samples["train"]) == (vocab_size, length, train)
        assert task.batch_size == 128 and task.samples["test"] == 1_280
    noisy = NoisyRecall()
    assert (noisy.noise_tokens, noisy.noise) == (16, 0.2)
    assert FuzzyRecall().motif == 3 and SelectiveCopying().copies == 16


def pairs(task: InContextRecall, tokens: list[int]) -> list[tuple[int, tuple, tuple]]:
    """The pairs of a row, in order: where each begins, its key and its value."""
    out, t, T = [], 0, len(tokens)
    values = range(task.keys, task.keys + task.values)
    while t < T:
        begin, key, value = t, (), ()
        while t < T and tokens[t] < task.keys:
            key, t = (*key, tokens[t]), t + 1
        while t < T and tokens[t] in values:
            value, t = (*value, tokens[t]), t + 1
        if key:
            assert value  # no key without a value
            out.append((begin, key, value))
        else:
            assert not value  # nor a value without a key
            t += 1
    return out


RECALL = [
    InContextRecall(vocab_size=16, length=64, reach=13, sinks=7),
    NoisyRecall(vocab_size=24, length=64, noise_tokens=10, noise=0.3, reach=12, sinks=6),
    FuzzyRecall(vocab_size=9, length=100, reach=24, sinks=9),
]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", RECALL, ids=lambda task: type(task).__name__)
def test_keys_seen_before_are_asked_and_no_others(task: InContextRecall, split: str) -> None:
    sample = task.sample(split, ROWS)
    question = task.question(sample)
    reached = 0
    for n in ROWS:
        tokens = sample["tokens"][n].tolist()
        labels, lag = np.full(task.length, IGNORE), np.zeros(task.length, int)
        reachable, asked = np.zeros(task.length, bool), np.zeros(task.length, bool)
        seen: dict[tuple, list[int]] = {}
        book: dict[tuple, tuple] = {}
        for begin, key, value in pairs(task, tokens):
            assert book.setdefault(key, value) == value  # one value a key
            for j, token in enumerate(value if key in seen else ()):
                answer = begin + len(key) + j
                q = answer - 1
                labels[q] = token
                lag[q] = q - max(seen[key]) - len(key) - j
                reachable[q] = any(
                    q - at <= task.reach.back or at + len(key) + j < task.reach.sinks
                    for at in seen[key]
                )
                asked[begin : begin + len(key)] = True
            seen.setdefault(key, []).append(begin)
        assert (sample["labels"][n] == labels).all()
        assert (sample["lag"][n] == lag).all() and (lag[labels != IGNORE] >= 1).all()
        assert (sample["reachable"][n] == reachable).all()
        assert (question[n] == asked).all()
        assert labels[-2] != IGNORE  # the last key stood before
        reached += reachable.sum()
    assert 0.1 < reached / (sample["labels"] != IGNORE).sum() < 0.9


def test_in_context_recall_draws_keys_and_values_uniformly() -> None:
    task = InContextRecall()
    tokens = task.sample("train", np.arange(1000))["tokens"]
    keys, values = np.bincount(tokens[:, ::2].ravel()), np.bincount(tokens[:, 1::2].ravel())
    assert len(keys) == 8 and np.allclose(keys / keys.sum(), 1 / 8, atol=0.01)
    assert len(values) == 16 and (values[:8] == 0).all()
    assert np.allclose(values[8:] / values.sum(), 1 / 8, atol=0.01)
    # Values are drawn with replacement: 8 keys with 8 distinct values are rare (8! / 8^8).
    assert np.mean([len({*row}) == 8 for row in tokens[:, 1::2].tolist()]) < 0.02


def test_noise_replaces_pairs_at_its_share() -> None:
    tokens = NoisyRecall().sample("train", np.arange(500))["tokens"].reshape(500, 64, 2)
    noise = tokens >= 16
    assert (noise[..., 0] == noise[..., 1]).all()  # whole pairs
    # Of 64 pairs, the last and the one that it repeats are none.
    assert noise.mean() * 64 / 62 == pytest.approx(0.2, abs=0.01)
    counts = np.bincount(tokens[noise]) / noise.sum()
    assert len(counts) == 32 and np.allclose(counts[16:], 1 / 16, atol=0.01)
    task = NoisyRecall(noise=1)
    tokens = task.sample("train", ROWS)["tokens"]
    for row in tokens.tolist():
        assert len(pairs(task, row)) == 2
    assert (NoisyRecall(noise=0).sample("train", ROWS)["tokens"] < 16).all()


def test_motifs_are_of_one_to_three_tokens_and_asked_at_full_length() -> None:
    task = FuzzyRecall()
    for split, shares in (("train", [1 / 3] * 3), ("val", [0, 0, 1]), ("test", [0, 0, 1])):
        tokens = task.sample(split, np.arange(500))["tokens"]
        rows = [pairs(task, row) for row in tokens.tolist()]
        for row, found in zip(tokens, rows, strict=True):
            begin = found[0][0]
            assert (row[:begin] == 15).all() and (row[begin:] < 15).all() and begin < 12
        first = [found[0] for found in rows]  # later ones are the fewer, the longer they are
        for part, share in ((1, shares), (2, [1 / 3] * 3)):
            sizes = np.bincount([len(pair[part]) for pair in first], minlength=4)[1:]
            assert np.allclose(sizes / 500, share, atol=0.07)
    assert {*np.unique(tokens).tolist()} == {*range(16)}
    assert task.keys == 7 and task.values == 8


def test_tokens_are_copied_in_order() -> None:
    task = SelectiveCopying()
    sample = task.sample("train", np.arange(500))
    tokens, labels, lag = sample["tokens"], sample["labels"], sample["lag"]
    assert (tokens[:, -17] == 15).all() and (tokens[:, -16:] == 14).all()
    assert (labels[:, :-16] == IGNORE).all()
    data = tokens[:, :-17]
    assert ((data < 14).sum(1) == 16).all() and (data <= 14).all()
    assert (labels[:, -16:].ravel() == data[data < 14]).all()  # in order of position
    place = np.arange(256) - lag
    assert (np.take_along_axis(tokens, place, 1)[:, -16:] == labels[:, -16:]).all()
    gaps = np.diff(place[:, -16:], prepend=-1) - 1  # the blanks before each token
    assert np.allclose(gaps.mean(0), (256 - 33) / 16, atol=0.6)
    assert gaps.var(0).mean() == pytest.approx(223 * 15 / 256, rel=0.1)  # binomial
    window = SelectiveCopying(reach=100).sample("train", ROWS)
    where = window["labels"] != IGNORE
    assert (window["reachable"] == where & (window["lag"] <= 100)).all()


def test_compression_is_scored_at_every_token_and_reads_the_last_state_alone() -> None:
    task = Compression(reach=20, sinks=2)
    sample = task.sample("train", ROWS)
    assert (sample["tokens"][:, -1] == 15).all() and (sample["tokens"][:, :-1] < 15).all()
    assert (sample["labels"][:, :-1] == sample["tokens"][:, :-1]).all()
    assert (sample["labels"][:, -1] == IGNORE).all()
    assert (sample["lag"] == 31 - np.arange(32)).all()
    near = np.isin(np.arange(32), [0, 1, *range(11, 31)])
    assert (sample["reachable"] == near).all()
    readout = task.readout(LanguageModel(vocab_size=16, dim=24, depth=1, layers=["linear"]))
    assert readout is not None
    h = torch.randn(3, 32, 24, requires_grad=True)
    where = torch.from_numpy(sample["labels"][:3] != IGNORE)
    where[1, 5:20] = False
    logits = readout(h, where)
    assert logits.shape == (3 * 31 - 15, 16)
    (seen,) = torch.autograd.grad(logits[:31].square().sum(), h)  # of the first row
    assert seen[0, -1].abs().min() > 0
    assert not seen[0, :-1].any() and not seen[1:].any()
    assert len(logits[:31].unique(dim=0)) == 31  # each position has its own
    assert torch.allclose(logits[31:36], readout(h[1:2], torch.ones(1, 5, dtype=torch.bool)))


SMALL = [
    *("--model.network.dim", "16", "--model.network.depth", "1", "--data.batch_size", "32"),
    *("--data.val_samples", "64", "--data.test_samples", "64"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


def run(command: str, folder: Path, task: str, *options: str) -> None:
    """A small run with the shipped config, logging to `folder`."""
    logger = "--trainer.logger.init_args"
    where = (f"{logger}.save_dir", str(folder), f"{logger}.name", "", f"{logger}.version", "")
    assert main([command, "--config", "mad", "--data", task, *where, *SMALL, *options]) == 0


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.mark.parametrize("cls", [NoisyRecall, Memorization], ids=lambda cls: cls.__name__)
def test_another_task_trains_with_the_shipped_config(cls: type, tmp_path: Path) -> None:
    steps = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    run("fit", tmp_path, cls.__name__, *steps)
    assert scalars(tmp_path, "loss/held_out")[-1] < 2 * np.log(BASELINE[cls][0])


def test_compression_learns_and_its_readout_is_in_the_checkpoint(tmp_path: Path) -> None:
    size = ("--data.vocab_size", "3", "--data.length", "5")
    steps = ("--trainer.max_steps", "80", "--trainer.val_check_interval", "80")
    trained = tmp_path / "trained"
    run("fit", trained, "Compression", *size, *steps, "--model.lr", "2e-2")
    accuracy = scalars(trained, "recall/accuracy")
    assert accuracy[-1] > 0.65 and scalars(trained, "recall/ceiling") == [1]
    checkpoint = ("--ckpt_path", str(trained / "checkpoints" / "last.ckpt"))
    for command, prefix in (("validate", ""), ("test", "test/")):
        run(command, tmp_path / command, "Compression", *size, *checkpoint)
        (again,) = scalars(tmp_path / command, f"{prefix}recall/accuracy")
        assert again == accuracy[-1] if command == "validate" else again > 0.65


def test_facts_are_the_same_in_all_splits_and_others_with_another_seed() -> None:
    task = Memorization()
    facts = task.facts()
    assert len({*facts.tolist()}) == len(facts) == 127
    assert facts.min() >= 127 and facts.max() < 255 and task.values == 128
    for split in SPLITS:
        sample = task.sample(split, ROWS)
        keys, labels = sample["tokens"][:, ::2], sample["labels"][:, 1::2]
        assert (sample["tokens"][:, 1::2] == 255).all() and keys.max() < 127
        assert (sample["labels"][:, ::2] == IGNORE).all()
        assert (labels == facts[keys]).all()
    # The control: what is known of one seed's facts answers another's at chance.
    same = [np.mean(Memorization(seed=seed).facts() == facts) for seed in range(1, 301)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same) - task.chance) < 3 * error and not Memorization.in_context


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InContextRecall(length=31), "length: must be even"),
        (lambda: InContextRecall(length=2), "length: must be at least 4"),
        (lambda: InContextRecall(vocab_size=3), "vocab_size: must be at least 4"),
        (lambda: NoisyRecall(vocab_size=16), "vocab_size: must be at least 20, got 16"),
        (lambda: NoisyRecall(noise=1.5), r"noise: must be in \[0, 1\]"),
        (lambda: NoisyRecall(noise_tokens=0), "noise_tokens: must be at least 1"),
        (lambda: FuzzyRecall(length=11), "length: must be at least 12"),
        (lambda: FuzzyRecall(motif=0), "motif: must be at least 1"),
        (lambda: FuzzyRecall(vocab_size=8193, motif=6), "motif: 6 tokens of 4096 make too many"),
        (lambda: FuzzyRecall(vocab_size=4), "vocab_size: must be at least 5"),
        (lambda: SelectiveCopying(length=32), "16 copies need at least 33, got 32"),
        (lambda: SelectiveCopying(copies=0), "copies: must be at least 1"),
        (lambda: SelectiveCopying(vocab_size=3), "vocab_size: must be at least 4"),
        (lambda: Compression(length=1), "length: must be at least 2"),
        (lambda: Compression(vocab_size=2), "vocab_size: must be at least 3"),
        (lambda: Memorization(length=3), "length: must be even"),
        (lambda: Memorization(vocab_size=4), "vocab_size: must be at least 5"),
        (lambda: Memorization(shuffled=True), "shuffled: its answers do not stand"),
    ],
)
def test_bad_options_are_one_clear_line(make, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
