"""What every task promises, over all of their `cases`: no edit when a task is added.

Golden hashes are in golden_tasks.json; a change of a hash changes every published number of that
task. `python tests/test_task_suite.py` writes the file anew, for a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from layerzoo.data import list_tasks
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task

GOLDEN = Path(__file__).with_name("golden_tasks.json")
OWN = [cls for cls in list_tasks() if cls.__module__.startswith("layerzoo.")]
CASES = {
    f"{cls.__name__}-{n}": (cls, options) for cls in OWN for n, options in enumerate(cls.cases)
}
WITHOUT = {"Text", "Continual"}
"""Tasks without cases: of files, and of other tasks. They have tests of their own."""


def make(name: str, **options: Any) -> Task:
    cls, case = CASES[name]
    return cls(**{**case, **options})


def draw(task: Task, split: str, count: int) -> Arrays:
    """Samples, with annotations of a row spread over its positions."""
    arrays = task.batch(split, range(count))
    shape = arrays["tokens"].shape
    return {name: x.expand(*shape, *x.shape[2:]).numpy() for name, x in arrays.items()}


def digest(task: Task) -> str:
    """A hash of all that the first samples of the splits hold."""
    sha = hashlib.sha256()
    for split in SPLITS:
        for name, array in sorted(task.batch(split, range(32)).items()):
            sha.update(f"{split} {name} {array.dtype} {[*array.shape]}".encode())
            sha.update(array.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_task_has_cases() -> None:
    assert {cls.__name__ for cls in OWN if not cls.cases} <= WITHOUT
    assert len(CASES) > 4


def test_samples_have_the_shape_that_is_promised(name: str) -> None:
    task = make(name)
    batch = task.batch("train", range(32))
    shape = (32, task.length)
    for key in ("tokens", "labels"):
        assert batch[key].dtype == torch.int64 and batch[key].shape == shape
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < task.vocab_size
    labels = batch["labels"]
    assert (labels != IGNORE).any(1).all()  # each row asks something
    assert labels[labels != IGNORE].min() >= 0 and labels.max() < task.vocab_size
    for value in batch.values():
        assert value.shape[0] == 32 and value.shape[1] in (1, task.length)
    assert not {*batch} & {"logits", "documents"}


def test_a_sample_depends_on_seed_split_and_index_alone(name: str) -> None:
    task, again = make(name), make(name)
    whole = task.batch("train", range(20))
    np.random.seed(1), torch.manual_seed(1), random.seed(1)  # none of which is asked
    alone = again.batch("train", [13])  # another object, another batch, another order
    for key, value in whole.items():
        assert torch.equal(value[13:14], alone[key]), key
    for other in (task.batch("val", range(20)), make(name, seed=1).batch("train", range(20))):
        assert any(not torch.equal(whole[key], other[key]) for key in ("tokens", "labels"))


def test_samples_are_the_same_on_every_machine(name: str) -> None:
    assert digest(make(name)) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-0")])
def test_worker_processes_change_nothing(name: str) -> None:
    own = make(name, train_samples=20, batch_size=4).train_dataloader()
    theirs = make(name, train_samples=20, batch_size=4, num_workers=2).train_dataloader()
    count = 0
    for one, other in zip(own, theirs, strict=True):
        count += 1
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert count == 5


def right(task: Task, sample: Arrays) -> np.ndarray:
    """Whether the solver answers each label, row by row."""
    where = sample["labels"] != IGNORE
    answers = np.stack([task.solve(tokens) for tokens in sample["tokens"]])
    return (answers == sample["labels"])[where]


def test_the_solver_answers_everything(name: str) -> None:
    assert right(make(name), draw(make(name), "test", 128)).all()


def test_a_shuffled_context_brings_the_solver_to_chance(name: str) -> None:
    task = make(name, shuffled=True)
    if not task.in_context:
        pytest.skip("the answer stands in no context")
    assert task.chance is not None and 0 < task.chance < 1
    hits = right(make(name), draw(task, "test", 1000))
    error = (task.chance * (1 - task.chance) / len(hits)) ** 0.5
    assert abs(hits.mean() - task.chance) <= 3 * error


def test_the_question_alone_tells_nothing(name: str) -> None:
    """The best table from a position, its token or the one before to the label guesses at chance:
    the answer leaks neither by place nor by the question's words."""
    task = make(name)
    if not task.in_context:
        pytest.skip("the answer stands in no context")
    assert task.chance is not None
    splits = {split: draw(task, split, 2000) for split in ("train", "test")}
    features: dict[str, dict[str, np.ndarray]] = {}
    labels: dict[str, np.ndarray] = {}
    for split, sample in splits.items():
        where = sample["labels"] != IGNORE
        labels[split] = sample["labels"][where]
        tokens = np.where(task.question(sample), sample["tokens"], 0)
        before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        position = np.broadcast_to(np.arange(task.length), tokens.shape)
        pairs = {
            "position": position,
            "token": tokens,
            "before": before * task.vocab_size + tokens,
        }
        features[split] = {key: value[where] for key, value in pairs.items()}
    for key in features["train"]:
        table: dict[int, int] = {}
        for feature in np.unique(features["train"][key]):
            seen = labels["train"][features["train"][key] == feature]
            table[int(feature)] = int(np.bincount(seen).argmax())
        guess = np.array([table.get(int(f), -1) for f in features["test"][key]])
        hits = guess == labels["test"]
        error = (task.chance * (1 - task.chance) / len(hits)) ** 0.5
        assert hits.mean() <= task.chance + 3 * error, key


def test_the_answer_stands_at_its_lag(name: str) -> None:
    sample = draw(make(name), "train", 64)
    if "lag" not in sample:
        pytest.skip("no lag")
    row, at = np.nonzero(sample["labels"] != IGNORE)
    lag = sample["lag"][row, at]
    assert (lag > 0).all()
    assert (sample["tokens"][row, at - lag] == sample["labels"][row, at]).all()


def test_the_reach_bounds_the_ceiling(name: str) -> None:
    task = make(name, test_samples=100)
    if "reachable" not in draw(task, "test", 2):
        pytest.skip("no ceiling")
    shares = [make(name, reach=r, test_samples=100).ceiling() for r in (0, task.length // 4)]  # type: ignore[attr-defined]
    assert shares[0] == 0 < shares[1] < 1 == task.ceiling()  # type: ignore[attr-defined]


def test_metrics_of_perfect_and_of_random_answers(name: str) -> None:
    task = make(name)
    sample = draw(task, "test", 64)
    where = sample["labels"] != IGNORE
    annotations = {key: torch.from_numpy(value[where].copy()) for key, value in sample.items()}
    labels = annotations.pop("labels")
    del annotations["tokens"]
    for logits in (
        F.one_hot(labels, task.vocab_size).float() * 50,
        torch.randn(len(labels), task.vocab_size),
    ):
        figures: dict[str, float] = {}
        for metric in task.metrics():
            metric.update(logits, labels, **annotations)
            figures |= {key: float(value) for key, value in metric.compute().items()}
        assert all(np.isfinite(value) for value in figures.values())
        accuracy = figures.get("recall/accuracy", figures.get("accuracy/all"))
        assert accuracy is not None
        assert (accuracy == 1) == (logits.max() == 50)


if __name__ == "__main__":
    hashes = {name: digest(make(name)) for name in CASES}
    GOLDEN.write_text(json.dumps(hashes, indent=2) + "\n")
