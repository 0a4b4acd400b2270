"""The faults that `make mutants` plants fit the code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.right[:30]}")
def test_a_fault_fits_the_code(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.right) == 1 and fault.wrong != fault.right
