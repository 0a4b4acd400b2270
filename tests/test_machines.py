"""The numeric tests pass on other CPUs: with the instructions, and so the sums, of smaller ones,
which libraries let one ask for, and with two threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUMERIC = (
    "kernels",
    "test_attention.py",
    "test_closed_form_layers.py",
    "test_closed_form_rules.py",
    "test_closed_forms.py",
    "test_compose.py",
    "test_conformance.py",
    "test_fast_weights.py",
    "test_fast_weights_layers.py",
    "test_fast_weights_rules.py",
    "test_fast_weights_vectors.py",
    "test_generate.py",
    "test_hf.py",
    "test_model.py",
    "test_ops.py",
    "test_resume.py",
    "test_rotary.py",
    "test_shell.py",
    "test_training.py",
    "test_vectors.py",
)
NEVER_MORE = {  # NumPy multiplies in OpenBLAS, and Triton's interpreter in NumPy
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "OMP_WAIT_POLICY": "passive",  # threads that wait take no core from those that work
}
MACHINES = {
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("machine", MACHINES)
def test_numeric_tests_pass_on(machine: str, threads: int) -> None:
    ours = ("PYTEST_", "TORCHINDUCTOR_")  # torch sets the latter: code for this machine
    own = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment = own | NEVER_MORE | MACHINES[machine] | {"TEST_THREADS": str(threads)}
    # The kernels that are compiled do not depend on the CPU.
    processes = str(2 // threads)  # more threads than cores crawl
    command = [sys.executable, "-m", "pytest", "-n", processes, "-p", "no:cacheprovider"]
    command += ["--tb=short"]
    command += ["--deselect", "tests/kernels/test_compile.py", *(f"tests/{n}" for n in NUMERIC)]
    made = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, f"{made.stdout[-4000:]}{made.stderr[-2000:]}"
