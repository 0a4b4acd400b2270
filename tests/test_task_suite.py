"""The laws of layerzoo.testing, for every task of layerzoo: no edit here when a task is added.

The golden hashes are in golden_tasks.json. A change of a hash changes every published number of
that task; `layerzoo check NAME --golden tests/golden_tasks.json --write` writes those of one task.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from layerzoo.data import list_tasks
from layerzoo.testing import Check, task_checks

GOLDEN = Path(__file__).with_name("golden_tasks.json")
OWN = [cls for cls in list_tasks() if cls.__module__.startswith("layerzoo.")]
WITHOUT = {"Text", "RecallText", "Continual"}
"""Tasks without cases: of files, and of other tasks. They have tests of their own."""


def test_every_task_has_cases() -> None:
    assert {cls.__name__ for cls in OWN if not cls.cases} == WITHOUT


@pytest.mark.parametrize(
    "check", [check for cls in OWN for check in task_checks(cls, GOLDEN)], ids=str
)
def test_law(check: Check) -> None:
    check()
