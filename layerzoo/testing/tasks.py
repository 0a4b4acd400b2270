"""The cases of a task, its laws, and its golden hashes."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task
from layerzoo.testing.check import Broken, Check, Law, checks, laws, require

LAWS: list[Law] = []
law = laws(LAWS)


class TaskCase(NamedTuple):
    """Options of `Task.cases`, by their index. golden: the hash that its samples should have."""

    cls: type[Task]
    n: int
    golden: str | None = None

    def __str__(self) -> str:
        return f"{self.cls.__name__}-{self.n}"

    @property
    def told(self) -> str:
        """The case in words."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.cls.cases[self.n].items())
        return f"{self.cls.__name__}({options})"

    def make(self, **options: Any) -> Task:
        return self.cls(**{**self.cls.cases[self.n], **options})


def task_checks(cls: type[Task], golden: Path | None = None, quick: bool = False) -> list[Check]:
    """The checks of a task: every law, for every one of its cases.

    Args:
        cls: a task that has `cases`, and whose samples depend on no file.
        golden: a JSON file of hashes by case, as `layerzoo check --golden` writes it. Without it
            nothing says that samples are the same on every machine.
        quick: leave out what starts processes.

    Returns:
        checks, to be called; `str` of one is its id, such as `MQAR-0-solver`.
    """
    found = [TaskCase(cls, n) for n in range(len(cls.cases))]
    if golden is not None:
        known = _hashes(golden)
        found = [case._replace(golden=known.get(str(case), "")) for case in found]
    return checks(LAWS, found, quick)


def write_golden(cls: type[Task], golden: Path) -> None:
    """Write the hashes of a task's cases into the file, and leave those of other tasks alone."""
    cases = [TaskCase(cls, n) for n in range(len(cls.cases))]
    found = {str(case): digest(case.make()) for case in cases}
    known = _hashes(golden).items()
    others = {
        name: known_hash for name, known_hash in known if name.rpartition("-")[0] != cls.__name__
    }
    text = json.dumps(dict(sorted((others | found).items())), indent=2)
    golden.write_text(text + "\n", encoding="utf-8")


def _hashes(golden: Path) -> dict[str, str]:
    return json.loads(golden.read_text(encoding="utf-8")) if golden.is_file() else {}


def digest(task: Task) -> str:
    """A hash of all that the first samples of the splits hold."""
    sha = hashlib.sha256()
    for split in SPLITS:
        for name, array in sorted(task.batch(split, range(32)).items()):
            sha.update(f"{split} {name} {array.dtype} {[*array.shape]}".encode())
            sha.update(array.numpy().tobytes())
    return sha.hexdigest()


def draw(task: Task, split: str, count: int) -> Arrays:
    """Samples, with annotations of a row spread over its positions."""
    arrays = task.batch(split, range(count))
    shape = arrays["tokens"].shape
    return {name: x.expand(*shape, *x.shape[2:]).numpy() for name, x in arrays.items()}


@law("a batch that is not of int64, or a sample without a question")
def samples(case: TaskCase) -> None:
    """A batch has tokens and labels `[B, T]` within the vocabulary, every row asks something, and
    annotations are of a row or of its positions."""
    task = case.make()
    batch = task.batch("train", range(32))
    for key in ("tokens", "labels"):
        x = batch[key]
        is_right = x.dtype == torch.int64 and x.shape == (32, task.length)
        require(is_right, f"{key} are {[*x.shape]} of {x.dtype}, not [32, {task.length}] of int64")
    scored = batch["labels"] != IGNORE
    silent = (~scored.any(1)).nonzero().flatten().tolist()
    require(not silent, f"samples {silent} have no label")
    for key, x in (("tokens", batch["tokens"]), ("labels", batch["labels"][scored])):
        low, high = int(x.min()), int(x.max())
        inside = low >= 0 and high < task.vocab_size
        require(inside, f"{key} go from {low} to {high} in a vocabulary of {task.vocab_size}")
    for key, x in batch.items():
        fits = x.shape[0] == 32 and x.shape[1] in (1, task.length)
        require(fits, f"{key} is {[*x.shape]}, and should begin with [32, 1 or {task.length}]")
    taken = {*batch} & {"logits", "documents"}
    require(not taken, f"an annotation may not be called {', '.join(taken)}")


@law("a generator that is not seeded by (seed, split, index), or one that goes on from the last")
def purity(case: TaskCase) -> None:
    """A sample depends on seed, split and index alone."""
    task, again = case.make(), case.make()
    batch = task.batch("train", range(20))
    for seed in (np.random.seed, torch.manual_seed, random.seed):  # none of which may be asked
        seed(1)
    alone = again.batch("train", [13])  # another object, another batch, another order
    for key, value in batch.items():
        require(torch.equal(value[13:14], alone[key]), f"{key} of sample 13 is another one alone")
    others = {
        "split": task.batch("val", range(20)),
        "seed": case.make(seed=1).batch("train", range(20)),
    }
    for name, other in others.items():
        differs = any(not torch.equal(batch[key], other[key]) for key in ("tokens", "labels"))
        require(differs, f"another {name} gives the same samples")


@law(
    "a change of the samples, which changes every published number of the task; write the hashes "
    "anew with `layerzoo check NAME --golden FILE --write` if it is meant",
    applies=lambda case: case.golden is not None,
)
def golden(case: TaskCase) -> None:
    """Samples are the same on every machine and in every version."""
    require(case.golden, "the file of golden hashes has none of this case")
    require(digest(case.make()) == case.golden, "samples have another hash")


@law("a generator that all workers share", applies=lambda case: case.n == 0, slow=True)
def workers(case: TaskCase) -> None:
    """Worker processes change no batch."""
    options = {"train_samples": 20, "batch_size": 4}
    own = case.make(**options).train_dataloader()
    theirs = case.make(**options, num_workers=2).train_dataloader()
    pairs = [*zip(own, theirs, strict=True)]
    require(len(pairs) == 5, f"20 samples in batches of 4 are {len(pairs)} batches")
    for one, other in pairs:
        for key in one:
            require(torch.equal(one[key], other[key]), f"{key} differs")


def hits(task: Task, sample: Arrays) -> np.ndarray:
    """Where the solver answers the label."""
    answers = np.stack([task.solve(tokens) for tokens in sample["tokens"]])
    return answers == sample["labels"]


def above_chance(task: Task, sample: Arrays, right: np.ndarray) -> float:
    """Accuracy minus chance in standard errors; rows are independent, labels of a row are not."""
    chance = task.chance
    require(chance is not None and 0 < chance < 1, f"chance is {chance}, not between 0 and 1")
    where = sample["labels"] != IGNORE
    excess = (where & right).sum(1) - chance * where.sum(1)
    return excess.sum() / np.sqrt((excess**2).sum())


@law("a question that its sample does not answer, or a solver that reads it otherwise")
def solver(case: TaskCase) -> None:
    """`solve` answers everything from the tokens alone."""
    task = case.make()
    sample = draw(task, "test", 128)
    wrong = ~(hits(task, sample) | (sample["labels"] == IGNORE))
    where = [tuple(map(int, at)) for at in np.argwhere(wrong)[:3]]
    require(not wrong.any(), f"{wrong.sum()} answers are wrong, the first at (row, token) {where}")


def _in_context(case: TaskCase) -> bool:
    return case.cls.in_context


@law("an answer that stands outside the context, or a chance that is not so", _in_context)
def shuffled(case: TaskCase) -> None:
    """With another sample's context the solver is within 3 standard errors of chance."""
    task = case.make(shuffled=True)
    sample = draw(task, "test", 1000)
    errors = above_chance(task, sample, hits(task, sample))
    require(abs(errors) <= 3, f"the solver is {errors:.1f} standard errors from chance")


@law("answers that are not drawn evenly, or a question whose words depend on them", _in_context)
def leaks(case: TaskCase) -> None:
    """No table from a position, its token, or it and the token before, to the label beats chance
    by more than 3 standard errors."""
    task = case.make()
    train, test = draw(task, "train", 2000), draw(task, "test", 2000)
    for feature in ("position", "token", "token and the one before"):
        here, there = (_feature(task, sample, feature) for sample in (train, test))
        best = _commonest(here, train["labels"], int(there.max()) + 1)
        errors = above_chance(task, test, best[there] == test["labels"])
        require(errors <= 3, f"a table of {feature} is {errors:.1f} standard errors above chance")


def _commonest(feature: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """The label that comes most often with each value of a feature below size; -1 with none."""
    scored = (labels != IGNORE) & (feature < size)
    pairs = np.stack((feature[scored], labels[scored]))
    (values, found), counts = np.unique(pairs, axis=1, return_counts=True)
    rarest_first = np.argsort(counts, kind="stable")
    table = np.full(size, -1)
    table[values[rarest_first]] = found[rarest_first]  # the last one stays
    return table


def _feature(task: Task, sample: Arrays, name: str) -> np.ndarray:
    """A number for each position; what is context and not question is hidden."""
    tokens = np.where(task.question(sample), sample["tokens"] + 1, 0)
    before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    position = np.broadcast_to(np.arange(task.length), tokens.shape)
    both = before * (task.vocab_size + 1) + tokens
    return {"position": position, "token": tokens}.get(name, both)


def _is_recall(case: TaskCase) -> bool:
    return issubclass(case.cls, RecallTask)


@law("a lag that counts from another token than the question", applies=_is_recall)
def lag(case: TaskCase) -> None:
    """The answer stands `lag` tokens before the question."""
    task = case.make()
    sample = draw(task, "train", 64)
    row, at = np.nonzero(sample["labels"] != IGNORE)
    lags = sample["lag"][row, at]
    require((lags > 0).all(), f"the smallest lag is {lags.min()}")
    own = type(task).readout is not Task.readout
    query = task.length - 1 if own else at  # a readout of its own reads the last state
    right = sample["tokens"][row, query - lags] == sample["labels"][row, at]
    require(right.all(), f"another token stands there for {(~right).sum()} of {right.size} labels")


@law("a reach that leaves out the key or the value", applies=_is_recall)
def ceiling(case: TaskCase) -> None:
    """The ceiling rises with the reach, from 0 to 1."""

    def of(reach: int | None) -> float:
        task = case.make(reach=reach, test_samples=100)
        assert isinstance(task, RecallTask)
        return task.ceiling()

    half = case.make().length // 2
    found = [of(0), of(half), of(None)]
    rises = found[0] == 0 < found[1] < 1 == found[2]
    require(rises, f"with a reach of 0, {half} and all it is {', '.join(map(str, found))}")


@law("a metric that divides by the number of questions of a kind that has none")
def metrics(case: TaskCase) -> None:
    """Metrics are finite for perfect and for random answers, and an accuracy is 1 for the perfect
    ones alone."""
    task = case.make()
    sample = draw(task, "test", 64)
    where = sample["labels"] != IGNORE
    annotations = {key: torch.from_numpy(value[where].copy()) for key, value in sample.items()}
    labels = annotations.pop("labels")
    del annotations["tokens"]
    generator = torch.Generator().manual_seed(0)
    perfect = F.one_hot(labels, task.vocab_size).float() * 50
    chance = torch.randn(len(labels), task.vocab_size, generator=generator)
    for name, logits in (("perfect", perfect), ("random", chance)):
        figures: dict[str, float] = {}
        for metric in task.metrics():
            metric.update(logits, labels, **annotations)
            figures |= {key: float(value) for key, value in metric.compute().items()}
        broken = [key for key, value in figures.items() if not np.isfinite(value)]
        require(not broken, f"{', '.join(broken)} of {name} answers: not finite")
        accuracy = figures.get("recall/accuracy", figures.get("accuracy/all"))
        if accuracy is None:
            raise Broken("there is neither recall/accuracy nor accuracy/all")
        require((accuracy == 1) == (name == "perfect"), f"accuracy of {name} answers: {accuracy}")
