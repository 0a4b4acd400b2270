"""`layerzoo bench gpu`: the kernels on this machine's GPU, beside their peers, to one file.

It is many `layerzoo bench ops` (gpu.yaml). All are first run once, side by side, which compiles
what they need; then one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from layerzoo.ops import ImplError
from layerzoo.spec import SpecError, suggest
from layerzoo.support.arguments import CommandParser, make_folder
from layerzoo.support.json_files import write_json

from .measure import hardware

TABLE = Path(__file__).with_name("gpu.yaml")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("layerzoo bench gpu", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("kernels/results"),
        help="write the file here",
    )
    add(
        "--table",
        metavar="YAML",
        type=Path,
        default=TABLE,
        help="time what this file lists, as gpu.yaml",
    )
    add("--only", metavar="TEXT", default="", help="time only what has this in its name")
    add(
        "--report", metavar="PAGE", type=Path, help="measure nothing; put what --out has in a page"
    )
    add(
        "--jobs",
        metavar="N",
        type=int,
        default=os.cpu_count() or 1,
        help="compile first in N processes; 0 does not",
    )
    return parser.parse_args(argv)


def options_of(fields: Mapping[str, Any]) -> list[str]:
    """The arguments of `layerzoo bench ops`."""
    names = list(fields["names"])
    rest = ((f"--{key}", str(value)) for key, value in fields.items() if key != "names")
    fixed = ("--device", "cuda", "--dtype", "bfloat16", "--impl", "triton")
    return ["ops", *names, *fixed, *(word for pair in rest for word in pair)]


def lengths_of(fields: Mapping[str, Any]) -> list[str]:
    """Those that compile for themselves: flex_attention does for every one."""
    lengths = str(fields["lengths"]).split(",")
    return lengths if "flex_attention" in fields["against"] else lengths[:1]


def warm(table: Mapping[str, Mapping[str, Any]], jobs: int) -> None:
    """Run each layer of each benchmark once, in processes of its own, so that all is compiled.
    What fails here says so when it is measured."""
    waiting = [
        options_of({**fields, "names": [name], "repeats": 1, "lengths": T})
        for fields in table.values()
        for name in fields["names"]
        for T in lengths_of(fields)
    ]
    running: list[Any] = []
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    while waiting or running:
        while waiting and len(running) < jobs:
            command = [sys.executable, "-P", "-m", "layerzoo", "bench", *waiting.pop(0)]
            running.append(subprocess.Popen(command, **quiet))
        running[0].wait()
        running = [process for process in running if process.poll() is None]


def measure(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The file that the benchmark writes, or why it did not."""
    from .command import main as bench

    print(f"\n== {name}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        try:
            bench([*options_of(fields), "--json", str(path)])
        except (ImplError, SpecError) as error:  # one that cannot run does not cost the others
            print(f"failed: {error}", flush=True)
            return {"name": name, "failed": str(error)}
        return {"name": name, **json.loads(path.read_text(encoding="utf-8"))}


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    table = yaml.safe_load(options.table.read_text(encoding="utf-8"))
    if options.report:
        write = importlib.import_module("layerzoo.tools.bench.gpu_report").write
        write(options.out, options.report, table)
        return 0
    chosen = {name: fields for name, fields in table.items() if options.only in name}
    if not chosen:
        raise SpecError(
            f"--only {options.only}: no such benchmark; {suggest(options.only, table)}"
        )
    if not torch.cuda.is_available():
        raise SpecError(
            "layerzoo bench gpu: there is no GPU here; `layerzoo bench ops` needs none"
        )
    device = torch.device("cuda")
    make_folder("--out", options.out)
    if options.jobs:
        warm(chosen, options.jobs)
    slug = re.sub(r"[^a-z0-9]+", "-", hardware(device).lower()).strip("-")
    path, found = options.out / f"{slug}.json", []
    for title, fields in chosen.items():
        for name in fields["names"]:
            found.append(measure(title, {**fields, "names": [name]}))
            content = {"gpu": hardware(device), "benchmarks": found}
            write_json(path, content, indent=1)
    print(f"\nwrote {path}")
    return 1 if any("failed" in one for one in found) else 0
