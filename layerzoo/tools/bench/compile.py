"""`layerzoo bench compile [NAME ...]`: compile what layers launch, for GPUs that need not be here.

Each layer is run forward, backward and for one token, with its kernels not launched but listed as
they would be on the target, and what is listed is compiled (see layerzoo/kernels/compile.py).
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from layerzoo.ops import ImplError
from layerzoo.registry import build, check_spec, get_layer, list_layers
from layerzoo.spec import SpecError, suggest
from layerzoo.support.arguments import CommandParser, check_file, spec_of
from layerzoo.support.json_files import write_json

T = 192
"""Tokens: more than a chunk of any kernel, and not a power of two."""
HEAD = ("kernel", "of", "target", "dtype", "D", "registers", "spilled", "shared", "tensor cores")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("layerzoo bench compile", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="compile these layers or specs (default: all)")
    add(
        "--targets",
        default="sm_80,sm_90,gfx942",
        help="compile for some of sm_80, sm_90, sm_100, gfx942",
    )
    add("--dtypes", default="bfloat16", help="compile some of bfloat16, float16, float32")
    add("--head-dims", default="64", help="compile heads of so many channels, as 64,128")
    add("--jobs", metavar="N", type=int, default=os.cpu_count() or 1, help="start N processes")
    add("--json", metavar="FILE", type=Path, help="write all figures")
    return parser.parse_intermixed_args(argv)


def launches(spec: dict[str, Any], target: Any, dtype: torch.dtype, D: int) -> list[Any]:
    """What a layer of two heads launches, forward, backward and to decode."""
    recorded = importlib.import_module("layerzoo.kernels.launch").recorded
    torch.manual_seed(0)
    layer = build(spec, dim=2 * D).to(dtype)
    layer.impl = "triton"
    x = torch.randn(2, T, 2 * D, dtype=dtype, requires_grad=True)
    with recorded(target) as found:
        y, state = layer(x)
        y.float().sum().backward()
        with torch.no_grad():
            layer(x[:, :1], state)
    return found


def compile_all(
    spec: dict[str, Any], target: str, dtype: str, D: int
) -> list[dict[str, Any]] | str:
    """The figures of every kernel that a layer launches, or why it launches none."""
    compiled = importlib.import_module("layerzoo.kernels.compile").compiled
    machine = importlib.import_module("layerzoo.kernels.launch").TARGETS[target]
    try:
        found = launches(spec, machine, getattr(torch, dtype), D)
    except ImplError as reason:
        return str(reason)
    about = {"target": target, "dtype": dtype, "D": D}
    return [{**compiled(launch, machine)._asdict(), **about} for launch in found]


def specs_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    if names:
        return {text: spec_of(text) for text in names}
    found = {}
    for name in list_layers():
        op = get_layer(name).op
        if op is not None and "triton" in op.available():
            found[name] = {"name": name}
    return found


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SpecError("layerzoo bench compile: unset TRITON_INTERPRET, it compiles nothing")
    specs = specs_of(options.names)
    for spec in specs.values():
        check_spec(spec)
    check_file("--json", options.json)
    known = ("sm_80", "sm_90", "sm_100", "gfx942")
    for name in (targets := options.targets.split(",")):
        if name not in known:
            raise SpecError(f"--targets {name}: unknown; {suggest(name, known)}")
    jobs = [
        (label, target, dtype, int(D))
        for label in specs
        for target in targets
        for dtype in options.dtypes.split(",")
        for D in options.head_dims.split(",")
    ]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}  # each kernel once
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        results = pool.map(
            compile_all, *zip(*((specs[n], *rest) for n, *rest in jobs), strict=True)
        )
        for (label, target, *_), found in zip(jobs, results, strict=True):
            if isinstance(found, str):
                if options.names:
                    raise ImplError(found)
                print(f"skipped: {label} on {target}: {found}")
                continue
            for row in found:
                rows.setdefault((row["name"], target, row["types"]), {**row, "of": label})
    cells = [
        (
            row["name"],
            *(str(row[key]) for key in HEAD[1:8]),
            " ".join(f"{name} {n}" for name, n in row["tensor_cores"].items()) or "-",
        )
        for row in rows.values()
    ]
    widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]
    for line in (HEAD, *cells):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    if options.json:
        write_json(options.json, [*rows.values()], indent=1)
    return 0
