"""Classes whose options are the fields of a nested config: tasks and modules."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any, ClassVar

import pytest
import torch
from lightning import Trainer

from layerzoo import SpecError
from layerzoo.data import MQAR, Task, list_tasks
from layerzoo.hf.distil import Distil
from layerzoo.train.lit import LitModel
from layerzoo.train.module import TaskModule
from layerzoo.train.trained_on import trained_on


class Plain(Task):
    """A task of a user's."""

    class Config(Task.Config):
        length: int = 8
        noise: float = 0.5
        setting: str | None = None
        settings: ClassVar = {"long": {"length": 64}}

    vocab_size = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.length, self.noise = self.config.length, self.config.noise


class Moved(Plain):
    """Changes an argument in a variable."""

    def __init__(self, config: Plain.Config) -> None:
        super().__init__(config)
        length = config.length + 1  # one more for padding
        self.length, self.noise = length, 2 * config.noise


class Handed(Plain):
    """Changes an argument that it hands on."""

    def __init__(self, config: Plain.Config) -> None:
        more = {"length": config.length + 1, "noise": 2 * config.noise}
        super().__init__(dataclasses.replace(config, **more))


@pytest.mark.parametrize("cls", [Moved, Handed])
def test_a_task_that_changes_an_argument_is_varied_from_what_was_given(cls: type[Plain]) -> None:
    task = cls(length=10, lengths="20,30")
    assert (task.length, task.noise, task.given.length) == (11, 1.0, 10)
    for _ in range(3):
        task = task.varied(seed=1)
    assert (task.length, task.noise, task.given.length, task.seed) == (11, 1.0, 10, 1)
    assert [part.length for part in task.parts("test").values()] == [21, 31]
    settings = trained_on(Trainer(logger=False), TaskModule(), task, 0)["settings"]
    assert (settings["data.length"], settings["data.noise"]) == (10, 0.5)


def test_a_task_may_have_settings_of_its_own() -> None:
    task = Plain(setting="long", seed=2, batch_size=5)
    other = task.varied(seed=3)
    assert (other.length, other.seed, other.batch_size) == (64, 3, 5)
    assert (task.given.length, task.given.setting) == (8, "long")
    assert task.varied(length=7).length == 7
    assert Plain(length=16, seed=2).varied().length == 16
    with pytest.raises(SpecError, match="data: Plain: length: 9, but setting long has 64"):
        Plain(length=9, setting="long")
    with pytest.raises(SpecError, match="data: Plain: setting: no 'lang'; did you mean 'long'"):
        Plain(setting="lang")


def test_a_config_and_its_fields_are_the_same() -> None:
    config = MQAR.Config(vocab_size=32, length=16, pairs=2)
    task, same = MQAR(config), MQAR(vocab_size=32, length=16, pairs=2)
    assert task.given is config and same.given == config
    for other in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert other.given == config and type(other.given) is MQAR.Config
        for key, value in other.batch("val", range(3)).items():
            assert torch.equal(value, task.batch("val", range(3))[key])


@pytest.mark.parametrize("cls", [*list_tasks(), LitModel, Distil], ids=lambda cls: cls.__name__)
def test_the_signature_shows_the_fields(cls: Any) -> None:
    found = inspect.signature(cls).parameters
    fields = {field.name: field.default for field in cls.Config.fields()}
    missing = dataclasses.MISSING
    assert {n: missing if p.default is p.empty else p.default for n, p in found.items()} == fields
    assert all(not isinstance(p.annotation, str) for p in found.values())
    own = [name for name in vars(cls.Config)["__annotations__"] if name in fields]
    assert [*found][: len(own)] == own  # in front of its bases'


def test_what_is_no_config_is_refused() -> None:
    for wrong in ({"vocab_size": 32}, 32, Task.Config()):
        with pytest.raises(TypeError, match=r"MQAR takes a MQAR\.Config, or else its fields by"):
            MQAR(wrong)
    with pytest.raises(TypeError, match="or else its fields by keyword"):
        MQAR(MQAR.Config(), length=32)
    with pytest.raises(SpecError, match="data: MQAR: unknown field 'lenght'; did you mean 'len"):
        MQAR(lenght=32)
    with pytest.raises(SpecError, match="data: MQAR: length: must be even, got 31"):
        MQAR(length=32).varied(length=31)
    with pytest.raises(SpecError, match="data: MQAR: unknown field 'lenght'"):
        MQAR(length=32).varied(lenght=64)
    with pytest.raises(SpecError, match="model: unknown field 'rate'; known: betas, "):
        TaskModule(rate=0.1)
    with pytest.raises(SpecError, match=r"model\.lr: must be in \[0, inf\), got -1"):
        TaskModule(lr=-1)


def test_a_constructor_takes_a_config_alone() -> None:
    with pytest.raises(SpecError, match=r"Even: its constructor takes options; declare them as"):

        class Even(Task):
            def __init__(self, vocab_size: int = 16, **options: Any) -> None:
                super().__init__(**options)

    with pytest.raises(SpecError, match=r"Odd: its constructor takes options; declare them as"):

        class Odd(Task):
            def __init__(self, **options: Any) -> None:
                super().__init__(**options)


def test_a_module_may_save_more_hyperparameters() -> None:
    class Noted(TaskModule):
        def __init__(self, config: TaskModule.Config) -> None:
            super().__init__(config)
            self.save_hyperparameters({"note": "mine"})

    saved = Noted(lr=0.1).hparams
    assert saved == {**TaskModule.Config(lr=0.1).to_fields(), "note": "mine"}


def test_a_config_extends_those_of_all_bases() -> None:
    with pytest.raises(SpecError, match=r"Bare: its Config must extend Task\.Config"):

        class Bare(Task):
            class Config:
                length = 3

    with pytest.raises(SpecError, match=r"Both: its Config must extend MQAR\.Config"):

        class Both(Plain, MQAR):
            pass
