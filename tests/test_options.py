"""Options: each has a help text, wherever it is asked for, and the page holds them all."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerzoo import SpecError
from layerzoo.ablations.cells import claims, match, schema, tune
from layerzoo.ablations.cells import report_options as report
from layerzoo.ablations.cells.grid import load_grid
from layerzoo.cli import COMMANDS, TRAIN, main
from layerzoo.data import MQAR, Needle, Task, list_tasks
from layerzoo.hf.distil import Distil
from layerzoo.model import ModelConfig
from layerzoo.registry import get_layer, list_layers
from layerzoo.spec import Config
from layerzoo.support import internals
from layerzoo.support.arguments import CommandParser
from layerzoo.support.field_docs import field_docs, field_lines, field_rows
from layerzoo.train.callbacks import Controls
from layerzoo.train.checkpoints import Checkpoints
from layerzoo.train.lit import LitModel
from layerzoo.train.module import TaskModule
from layerzoo.train.parser import TrainingParser

ROOT = Path(__file__).parents[1]
TASKS = [cls for cls in list_tasks() if cls.__module__.startswith("layerzoo.")]
GRID = [schema.Fields, match.Match, tune.Tune, report.Report, report.ScalingLaw, claims.Claim]
TRAINED: list[Any] = [LitModel, Distil, Checkpoints, Controls, *TASKS]
OWNERS: list[Any] = [*TRAINED, *map(get_layer, list_layers())]
CONFIGS: list[type[Config]] = [ModelConfig, *(cls.Config for cls in OWNERS), *GRID]
RIDDLES = re.compile(r"\b(of which|that of|those of|what of|of it are)\b|^(Of|What|How|Whether) ")
"""Words that stand for others that a reader has to look for."""


def _named(config: type[Config]) -> str:
    return f"{config.__module__}.{config.__qualname__}"


@pytest.mark.parametrize("config", CONFIGS, ids=_named)
def test_every_field_is_explained_in_sentences(config: type[Config]) -> None:
    docs = field_docs(config)
    assert {field.name for field in config.fields()} == {*docs}
    for name, doc in docs.items():
        assert doc.endswith((".", ".)")) and not RIDDLES.search(doc), f"{name}: {doc}"


@pytest.mark.parametrize("cls", TRAINED, ids=lambda cls: cls.__name__)
def test_every_option_of_training_has_help(cls: Any) -> None:
    parser = TrainingParser(exit_on_error=False)
    added = parser.add_class_arguments(cls, "section", instantiate=False)
    parser.format_help()
    helps = {action.dest: action.help for action in internals.actions(parser)}
    assert added and {dest for dest in helps if dest.startswith("section.")} >= {*added}
    fields = {f"section.{name}": doc for name, doc in field_docs(cls.Config).items()}
    if cls is LitModel:
        del fields["section.network"]  # a heading of the options below it
        network = field_docs(ModelConfig)
        fields |= {f"section.network.{name}": doc for name, doc in network.items()}
    assert {dest: helps[dest] for dest in fields} == fields


def test_help_is_what_the_docstrings_say(capsys: pytest.CaptureFixture[str]) -> None:
    for words, config in ((["--data.help", "Needle"], Needle.Config), (["--help"], ModelConfig)):
        with pytest.raises(SystemExit):
            main(["fit", *words])
        said = " ".join(capsys.readouterr().out.split())
        for row in field_rows(config):
            assert " ".join(row["doc"].split()) in said, row["name"]


OTHERS = [name for name, (module, _) in COMMANDS.items() if module != TRAIN]
BELOW = {"bench": ("gpu", "stream", "compile")}


@pytest.mark.parametrize("words", [(n,) for n in OTHERS] + [("bench", n) for n in BELOW["bench"]])
def test_every_option_of_a_command_has_help(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers: list[CommandParser] = []
    monkeypatch.setattr(CommandParser, "print_help", lambda self, *_: parsers.append(self))
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    (parser,) = parsers
    actions = [a for a in internals.all_actions(parser) if a.help != argparse.SUPPRESS]
    assert actions
    for action in actions:
        commands = isinstance(action, argparse._SubParsersAction)
        assert action.help or commands, f"{action.option_strings or action.dest}"
        assert not RIDDLES.search(action.help or ""), action.help


def test_the_page_of_the_options_is_as_the_command_writes_it(tmp_path: Path) -> None:
    page = tmp_path / "options.md"
    assert main(["list", "--options", "--write", str(page)]) == 0
    written = page.read_text() == (ROOT / "docs" / "options.md").read_text()
    assert written, (
        "docs/options.md is older; run: layerzoo list --options --write docs/options.md"
    )


class Base(Config):
    """One of a user's."""

    size: int = 1
    """How large
    it is."""
    other: bool = True
    "Another string is a docstring, too."

    constant = 3
    """This is no field."""


class Derived(Base):
    size: int = 2
    own: str
    """Its own."""


def test_docstrings_are_inherited_with_their_fields() -> None:
    docs = {"size": "How large it is.", "other": "Another string is a docstring, too."}
    assert field_docs(Base) == docs
    assert field_docs(Derived) == {**docs, "own": "Its own."}
    assert [row["name"] for row in field_rows(Derived)] == ["size", "own", "other"]
    assert field_lines(field_rows(Derived))[2:4] == ["  own: str required", "      Its own."]
    made = type("Made", (Base,), {"__annotations__": {"size": int}, "size": 5})
    assert field_docs(made) == docs  # its source cannot be read


CHOICES = (
    (
        "--model.impl autp",
        "model.impl: expected one of 'auto', 'recurrent', 'chunked', 'triton'",
    ),
    ("--model.schedule cosin", "got 'cosin'; did you mean 'cosine'?"),
    (
        "--data.filler rndom",
        "data: filler: expected one of 'zero', 'random', got 'rndom'; did ",
    ),
    ("--data.pairs x", "data: pairs: expected int or a list, got x"),
    ("--data.keys [1,2,3]", "data: keys: expected a list of 2"),
    ("--model.betas [0.9]", "model.betas: expected a list of 2, got [0.9]"),
    (
        "--trainer.precison 16",
        "trainer.precison: no such option; did you mean 'trainer.precis",
    ),
)


@pytest.mark.parametrize(("words", "said"), CHOICES)
def test_a_mistyped_choice_has_a_suggestion(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "mqar", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# A task in place of the config's

LINES = (
    ("--data Copying", "Copying takes the place of MQAR; it drops vocab_size, pairs; it keeps "),
    ("--data=Copying", "it keeps length 64, batch_size 64\n"),
    ("--data.class_path layerzoo.data.Copying --data.length 16", "it keeps batch_size 64\n"),
    ("--data Needle", "Needle takes the place of MQAR; it drops pairs; it keeps vocab_size 64, "),
    ("--config continual", "it drops vocab_size, length, pairs; it keeps batch_size 64\n"),
    ("--data MQAR", None),
    ("--data layerzoo.data.MQAR --data.pairs 4", None),
    ("--data.pairs 4", None),
    ("--data Nothing", None),
    ("--data nowhere.Nothing", None),
)


@pytest.fixture
def built_no_further(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("layerzoo.train.command.TrainCLI", lambda args: None)
    yield


@pytest.mark.parametrize(("words", "said"), LINES)
def test_fit_says_which_options_another_task_drops_and_keeps(
    words: str, said: str | None, built_no_further: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "mqar", *words.split()]) == 0
    error = capsys.readouterr().err
    assert error == "" if said is None else error.startswith("layerzoo: data: ") and said in error


def test_what_is_kept_is_what_the_run_has(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "StateTracking", "--model.network.vocab_size", "120", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mqar", *words])
    out, error = capsys.readouterr()
    assert "it drops vocab_size, pairs; it keeps length 64, batch_size 64" in error
    assert re.search(r"length: 64\n", out) and "pairs" not in out


GRID_FILE = """\
name: other
base: mqar
set: {{model.network.vocab_size: 64}}
axes:
  task:
    mqar: {{}}
    copy: {{{copy}}}
"""


def test_a_grid_names_the_way_out_of_another_tasks_options(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(GRID_FILE.format(copy="data.class_path: layerzoo.data.Copying"))
    with pytest.raises(SpecError) as error:
        load_grid(str(file))
    assert str(error.value) == (
        f"grid {file}:7: axes.task.copy.data.class_path: data: Copying does not take vocab_size, "
        "pairs of the base's MQAR; set the task as a whole, data: {class_path: "
        "layerzoo.data.Copying, init_args: {..}}"
    )
    whole = "data: {class_path: layerzoo.data.Copying, init_args: {length: 32}}"
    file.write_text(GRID_FILE.format(copy=whole))
    assert [cell.config["data"]["init_args"]["length"] for cell in load_grid(str(file)).cells()][
        :2
    ] == [64, 32]


def test_options_are_recorded_as_they_count() -> None:
    from lightning import Trainer

    from layerzoo.train.trained_on import trained_on

    def of(task: Task) -> dict[str, Any]:
        return trained_on(Trainer(logger=False), TaskModule(), task, 0)["settings"]

    found = of(MQAR(setting="recall-memory", train_samples=400))
    assert (found["data.length"], found["data.pairs"]) == (1024, 256)
    assert found["data.setting"] == "recall-memory" and of(MQAR())["data.setting"] is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "budget: many",
            ":2: budget: expected int or null, got 'many'. Each run has this many upd",
        ),
        (
            "tune: {axes: {model.lr: [1e-3]}}",
            ":2: tune: seeds: missing, and it has no default. Th",
        ),
        ("report: {columns: 3}", ":2: report: columns: expected a list of str, got 3. The table "),
        ("expect: [{arm: 3}]", ":2: expect.0: metric: missing, and it has no default. It is abou"),
    ],
)
def test_a_grid_says_what_a_field_means(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        GRID_FILE.format(copy="data.init_args.pairs: 4").replace("base", f"{line}\nbase")
    )
    with pytest.raises(SpecError) as error:
        load_grid(str(file))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_last_task_counts_wherever_it_is_named(
    built_no_further: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--data", "Needle", "--config", "mqar"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["fit", "--config", "needle", "--data", "Copying", "--config", "mqar"]) == 0
    assert "data: Copying takes the place of Needle; it drops" in capsys.readouterr().err
