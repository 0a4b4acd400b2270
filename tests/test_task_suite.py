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

from layerzoo.data import RecallTask, list_tasks
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task

GOLDEN = Path(__file__).with_name("golden_tasks.json")
OWN = [cls for cls in list_tasks() if cls.__module__.startswith("layerzoo.")]
CASES = {
    f"{cls.__name__}-{n}": (cls, options) for cls in OWN for n, options in enumerate(cls.cases)
}
IN_CONTEXT = [name for name, (cls, _) in CASES.items() if cls.in_context]
RECALL = [name for name, (cls, _) in CASES.items() if issubclass(cls, RecallTask)]
WITHOUT = {"Text", "RecallText", "Continual"}
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


def hits(task: Task, sample: Arrays) -> np.ndarray:
    """Where the solver answers the label."""
    answers = np.stack([task.solve(tokens) for tokens in sample["tokens"]])
    return answers == sample["labels"]


def above_chance(task: Task, sample: Arrays, right: np.ndarray) -> float:
    """Accuracy minus chance in standard errors; rows are independent, labels of a row are not."""
    assert task.chance is not None and 0 < task.chance < 1
    where = sample["labels"] != IGNORE
    excess = (where & right).sum(1) - task.chance * where.sum(1)
    return excess.sum() / np.sqrt((excess**2).sum())


def test_the_solver_answers_everything(name: str) -> None:
    task = make(name)
    sample = draw(task, "test", 128)
    assert (hits(task, sample) | (sample["labels"] == IGNORE)).all()


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_a_shuffled_context_brings_the_solver_to_chance(name: str) -> None:
    task = make(name, shuffled=True)
    sample = draw(task, "test", 1000)
    assert abs(above_chance(task, sample, hits(task, sample))) <= 3


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_the_question_alone_tells_nothing(name: str) -> None:
    """The best table from a position, its token or the one before to the label guesses at chance:
    the answer leaks neither by place nor by the question's words."""
    task = make(name)
    train, test = draw(task, "train", 2000), draw(task, "test", 2000)
    for feature in ("position", "token", "before"):
        table: dict[int, int] = {}
        here, labels = _feature(task, train, feature), train["labels"]
        scored = labels != IGNORE
        for value in np.unique(here[scored]):
            table[int(value)] = int(np.bincount(labels[scored & (here == value)]).argmax())
        there = _feature(task, test, feature)
        best = np.array([table.get(n, -1) for n in range(there.max() + 1)])
        assert above_chance(task, test, best[there] == test["labels"]) <= 3, feature


def _feature(task: Task, sample: Arrays, name: str) -> np.ndarray:
    """A number for each position; what is context and not question is hidden."""
    tokens = np.where(task.question(sample), sample["tokens"] + 1, 0)
    before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    position = np.broadcast_to(np.arange(task.length), tokens.shape)
    return {
        "position": position,
        "token": tokens,
        "before": before * (task.vocab_size + 1) + tokens,
    }[name]


@pytest.mark.parametrize("name", RECALL)
def test_the_answer_stands_at_its_lag(name: str) -> None:
    task = make(name)
    sample = draw(task, "train", 64)
    row, at = np.nonzero(sample["labels"] != IGNORE)
    lag = sample["lag"][row, at]
    assert (lag > 0).all()
    own = type(task).readout is not Task.readout
    query = task.length - 1 if own else at  # a readout of its own reads the last state
    assert (sample["tokens"][row, query - lag] == sample["labels"][row, at]).all()


@pytest.mark.parametrize("name", RECALL)
def test_the_reach_bounds_the_ceiling(name: str) -> None:
    def ceiling(reach: int | None) -> float:
        task = make(name, reach=reach, test_samples=100)
        assert isinstance(task, RecallTask)
        return task.ceiling()

    assert ceiling(0) == 0 < ceiling(make(name).length // 2) < 1 == ceiling(None)


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
