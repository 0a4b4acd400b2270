"""`make mutants`: plant each fault of faults.py, and see whether the tests find it.

A fault is planted in a copy of the package, never in the working tree. It is found if the tests
that run its file fail; they stop at the first failure. The command fails if fewer than 90% are
found, or a fault does not fit the code any more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .faults import FAULTS, LAWS, Fault

ROOT = Path(__file__).parents[2]
FOLDERS = ("memories", "attention", "kernels", "ablations")
WANTED = 0.9


class Result(NamedTuple):
    """What became of a fault: found, or not, in how many seconds, and by which test."""

    fault: Fault
    found: bool
    seconds: float
    test: str


def plant(fault: Fault, package: Path) -> None:
    """Copy the package to a folder, as it is installed, with the fault in it."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "layerzoo", package / "layerzoo", ignore=ignored)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, package / "layerzoo" / folder, ignore=ignored)
    inner = fault.file if fault.file.startswith("layerzoo/") else f"layerzoo/{fault.file}"
    text = (package / inner).read_text(encoding="utf-8")
    (package / inner).write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def runs(fault: Fault) -> Iterator[list[str]]:
    """Arguments of pytest: files of tests at once, then laws."""
    if files := [one for one in fault.tests if not one.startswith(LAWS)]:
        yield files
    for one in fault.tests:
        if one.startswith(LAWS):
            yield ["tests/test_conformance.py", "-k", one.removeprefix(LAWS)]


def python(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of a folder, and not with that of the working tree."""
    safe = {"PYTHONPATH": package, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    env = {**os.environ, **safe}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def check(fault: Fault) -> Result:
    """Plant a fault, and run the tests."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plant(fault, Path(folder))
        where = python(folder, "-c", "import layerzoo; print(layerzoo.__file__)").stdout
        if not where.startswith(folder):
            raise SystemExit(f"the package is not that of the fault, but {where}")
        for arguments in runs(fault):
            done = python(folder, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments)
            if done.returncode not in (0, 1):
                raise SystemExit(f"{fault.file}: pytest: {done.returncode}:\n{done.stdout}")
            if done.returncode:
                break
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    test = failed[0].split(" ")[1] if failed else ""
    return Result(fault, done.returncode == 1, time.monotonic() - began, test)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--only", help="faults in files whose path has this text")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.only or options.only in fault.file]
    for fault in faults:
        count = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.right)
        if count != 1:
            raise SystemExit(f"{fault.file}: has {count} times, not once: {fault.right}")
    began, results = time.monotonic(), list[Result]()
    print("| kind | file | planted | found by | seconds |\n| --- | --- | --- | --- | ---: |")
    with ThreadPoolExecutor(options.jobs) as pool:
        for one in pool.map(check, faults):
            results.append(one)
            wrong = " ".join(one.fault.wrong.split()) or "nothing, in place of a block"
            test = f"`{one.test}`" if one.found else "**not found**"
            kind, file = one.fault.kind, one.fault.file
            print(f"| {kind} | {file} | `{wrong}` | {test} | {one.seconds:.0f} |", flush=True)
    found, minutes = sum(one.found for one in results), (time.monotonic() - began) / 60
    print(f"\n{found} of {len(results)} faults are found, in {minutes:.0f} minutes.")
    return 0 if found >= WANTED * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
