"""layerzoo.testing finds what is planted, names it, and `layerzoo check` prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data.mqar import MQAR
from layerzoo.layer import Layer, Reduction, State, StateBytes
from layerzoo.memories.linear import LinearAttention
from layerzoo.ops import Op
from layerzoo.spec import Config
from layerzoo.testing import Broken, Check, layer_checks, task_checks
from layerzoo.testing.tasks import write_golden

OP = Op("test_average")


def average(v: Tensor, decay: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(v.shape[1]):
        state = decay * state + (1 - decay) * v[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1) if outputs else v, state


OP.register("recurrent")(average)
OP.register("chunked")(average)


class Average(Layer):
    """A moving average, in which tests plant faults."""

    class Config(Config):
        gated: bool = False

    kind = "memory"
    source = "textbook"
    op = OP
    cases = ({"gated": True},)

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.v, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.w = nn.Parameter(torch.zeros(dim))
        if config.gated:
            self.g = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x)) if state is None else state
        o, state = OP(self.impl, self.v(x), self.w.sigmoid(), state=state)
        return self.out(o * self.g.exp() if self.config.gated else o), state

    def init_state(self, batch_size: int) -> State:
        wide = torch.float64 if self.w.dtype == torch.float64 else torch.float32
        return torch.zeros(batch_size, self.dim, dtype=wide, device=self.w.device)

    def state_bytes(self, T: int) -> StateBytes:
        return StateBytes(4 * self.dim)

    def rule_flops(self, T: int) -> float:
        return 0.0


def forgets(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    y, state = Average.forward(self, x, state)
    return y, state * 0.5 if x.shape[1] > 1 else state


def looks_ahead(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    y, state = Average.forward(self, x, state)
    return y + 0.1 * y.flip(1), state


def overwrites(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    y, new = Average.forward(self, x, state)
    return y, new if state is None else state.copy_(new) if not state.requires_grad else new


def mixes_rows(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    y, state = Average.forward(self, x, state)
    return y + y.mean(0, keepdim=True), state


def detaches(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    state = self.init_state(len(x)) if state is None else state
    o, state = OP(self.impl, self.v(x), self.w.detach().sigmoid(), state=state)
    return self.out(o * self.g.exp()), state


def compiled_otherwise(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    y, state = Average.forward(self, x, state)
    return (2 * y if is_compiling() else y), state


def narrows(self: Any, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    y, state = Average.forward(self, x, state)
    return y, state.bfloat16()


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "forgets": ({"forward": forgets}, "pieces", "state differs by"),
    "looks ahead": (
        {"forward": looks_ahead},
        "causal",
        "token 3 changes the outputs of tokens [1, 2]",
    ),
    "overwrites": ({"forward": overwrites}, "rollback", "the state given: state differs by"),
    "mixes rows": ({"forward": mixes_rows}, "rows", "row 0 of 3: output differs by"),
    "detaches": ({"forward": detaches}, "gradients", "w has no gradient"),
    "compiles": ({"forward": compiled_otherwise}, "compiles", "compiled against eager: output"),
    "narrow": ({"forward": narrows}, "state_dtype", "the state has torch.bfloat16"),
    "bytes": ({"state_bytes": lambda self, T: StateBytes(4)}, "state_bytes", "96 bytes, not 4"),
    "flops": ({"rule_flops": lambda self, T: 8.0}, "flops", "flops_per_token is 2312, and mea"),
    "kind": ({"kind": "layer"}, "registered", "kind is 'layer'"),
    "neutral": (
        {"reductions": (Reduction({"gated": True}, {}, lambda layer: layer.g.data.fill_(0.1)),)},
        "reductions",
        "against {}: output differs by",
    ),
    "no gate": (
        {"reductions": (Reduction({}, {}, lambda layer: layer.w.data.zero_()),)},
        "reductions",
        "the gate changes nothing",
    ),
}


def broken(checks: list[Check]) -> dict[str, str]:
    """The laws that are broken, with a message each."""
    found = {}
    for check in checks:
        try:
            check()
        except Broken as error:
            found[check.law.name] = str(error)
    return found


@pytest.fixture
def plant(registry: Any) -> Iterator[Callable[..., list[Check]]]:
    def make(base: type[Layer] = Average, **changes: Any) -> list[Check]:
        type("Planted", (base,), changes, name="planted")
        return layer_checks("planted")

    yield make


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_a_layer_without_a_fault_keeps_all_laws(plant: Callable[..., list[Check]]) -> None:
    checks = plant(reductions=(Reduction({"gated": True}, {}, lambda x: x.g.data.zero_()),))
    assert broken(checks) == {}
    names = {check.law.name for check in checks}
    assert names >= {law for _, law, _ in FAULTS.values()} | {"implementations", "precision"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, plant: Callable[..., list[Check]]) -> None:
    changes, law, message = FAULTS[fault]
    found = broken([check for check in plant(**changes) if check.law.name == law])
    text = found[law]
    assert message in text
    assert text.startswith("planted-0-") and "\nlaw: " in text and "\nusual cause: " in text
    assert "\ncase: {gated: True} of dim 24, impl " in text


@pytest.mark.parametrize(
    "law, leaf", [("implementations", "state"), ("precision", "float32: output: ")]
)
def test_a_fault_of_an_implementation_is_named(
    law: str, leaf: str, plant: Callable[..., list[Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(v: Tensor, decay: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
        o, state = average(v, decay, state=state)
        if law == "precision" and v.dtype != torch.float64:
            state = state.half().float() * 1.001
        return o, state if law == "precision" else 1.01 * state

    checks = plant()
    monkeypatch.setitem(OP.impls, "chunked", faulty)
    found = broken([check for check in checks if check.law.name == law])
    assert leaf in found[law]


def test_a_gradient_is_named(
    plant: Callable[..., list[Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(v: Tensor, decay: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
        return average(v, decay.detach(), state=state)

    checks = plant()
    monkeypatch.setitem(OP.impls, "chunked", faulty)
    found = broken([check for check in checks if check.law.name == "implementations"])
    assert "gradient of w differs by" in found["implementations"]


def test_a_memory_that_is_aligned_at_the_left(plant: Callable[..., list[Check]]) -> None:
    def mix(self: Any, q: Tensor, write: Any, state: State) -> tuple[Tensor, State]:
        early = max(0, q.shape[1] - write.k.shape[1])
        o, after = LinearAttention.mix(self, q[:, : q.shape[1] - early], write, state)
        return torch.cat((o, self.read(q[:, q.shape[1] - early :], after)), 1), after

    found = broken(
        [check for check in plant(LinearAttention, mix=mix) if check.law.name == "alignment"]
    )
    assert "9 queries and 5 writes, against token by token" in found["alignment"]


def test_an_error_says_which_check_raised_it(plant: Callable[..., list[Check]]) -> None:
    def fails(self: Any, x: Tensor, state: State = None) -> Any:
        raise IndexError("no such channel")

    with pytest.raises(IndexError) as error:
        plant(forward=fails)[0]()
    assert "planted-0-recurrent raised this in a check." in error.value.__notes__[0]


def unanswered(self: Any, split: str, index: int) -> Any:
    arrays = MQAR.sample(self, split, index)
    arrays["labels"] = np.where(arrays["labels"] >= 0, 1, arrays["labels"])
    return arrays


def impure(self: Any, split: str, index: int) -> Any:
    arrays = MQAR.sample(self, split, index)
    arrays["tokens"][0] = np.random.randint(2)
    return arrays


def off_by_one(self: Any, split: str, index: int) -> Any:
    arrays = MQAR.sample(self, split, index)
    arrays["lag"] = arrays["lag"] + 1
    return arrays


def silent(self: Any, split: str, index: int) -> Any:
    arrays = MQAR.sample(self, split, index)
    return {**arrays, "labels": np.full_like(arrays["labels"], -100)}


@pytest.mark.parametrize(
    "change, law, message",
    [
        ({"sample": unanswered}, "solver", "answers are wrong, the first at"),
        ({"sample": unanswered}, "leaks", "a table of position is"),
        ({"sample": impure}, "purity", "tokens of sample 13 is another one alone"),
        ({"sample": off_by_one}, "lag", "another token stands there"),
        ({"sample": silent}, "samples", "have no label"),
        ({"chance": 0.5}, "shuffled", "standard errors from chance"),
        ({"ceiling": lambda self: 0.5}, "ceiling", "it is 0.5, 0.5, 0.5"),
    ],
)
def test_a_fault_of_a_task_is_named(change: dict[str, Any], law: str, message: str) -> None:
    cls = type("_Planted", (MQAR,), {**change, "cases": MQAR.cases[:1]})
    checks = [check for check in task_checks(cls, quick=True) if check.law.name == law]
    assert message in broken(checks)[law]


def test_golden_hashes_of_one_task(tmp_path: Path) -> None:
    file = tmp_path / "golden.json"
    file.write_text('{"Other-0": "abc"}')
    cls = type("_Kept", (MQAR,), {"cases": MQAR.cases[:1]})
    (check,) = (check for check in task_checks(cls, file) if check.law.name == "golden")
    with pytest.raises(Broken, match="has none of this case"):
        check()
    write_golden(cls, file)
    assert '"Other-0": "abc"' in file.read_text()
    (check,) = (check for check in task_checks(cls, file) if check.law.name == "golden")
    check()
    other = type("_Kept", (MQAR,), {"cases": ({**MQAR.cases[0], "seed": 3},)})
    (check,) = (check for check in task_checks(other, file) if check.law.name == "golden")
    with pytest.raises(Broken, match="--write` if it is meant"):
        check()


FILE = '''
from layerzoo.memories.linear import LinearAttention

class Mine(LinearAttention, name="mine_in_a_file"):
    """Linear attention that forgets what it read."""
    source = "nobody"
    cases = ({"heads": 2},)

    def mix(self, q, write, state):
        o, state = super().mix(q, write, state)
        return o, WRONG
'''


@pytest.mark.parametrize("wrong, status", [("state", 0), ("state * 0.5", 1)])
def test_the_command_checks_a_file(
    wrong: str,
    status: int,
    tmp_path: Path,
    registry: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE.replace("WRONG", wrong))
    assert main(["check", str(file), "--quick"]) == status
    out = capsys.readouterr().out
    if status:
        assert "mine_in_a_file-0-recurrent breaks a law: pieces [1, 1," in out
        assert "pieces          broken in 2 of 2" in out and "checks are broken" in out
    else:
        assert "pieces          holds in 2" in out and "checks hold" in out


def test_the_command_shows_where_an_error_was_raised(
    tmp_path: Path, registry: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE.replace("WRONG", "undefined"))
    assert main(["check", str(file), "--quick"]) == 1
    out = capsys.readouterr().out
    assert "NameError: name 'undefined' is not defined" in out and f'"{file}", line 11' in out
    assert "mine_in_a_file-0-recurrent raised this in a check." in out
    assert "registered      holds in 1" in out  # the other checks were run


@pytest.mark.parametrize(
    "argv, message",
    [
        (["lineer"], "unknown layer or task 'lineer'; did you mean 'linear'"),
        (["nothing.py"], "nothing.py: no such file"),
        (["empty.py"], "empty.py: defines no layer and no task"),
        (["wrong.py"], "wrong.py: SyntaxError"),
        (["Text"], "Text: has no cases"),
        (["MQAR", "--write"], "--write: give the file of hashes, too"),
    ],
)
def test_the_command_refuses(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("x = 1\n")
    Path("wrong.py").write_text("x = = 1\n")
    assert main(["check", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("layerzoo: error: check: ") and message in error
    assert error.count("\n") == 1


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(SpecError, match="unknown layer 'lineer'"):
        layer_checks("lineer")
