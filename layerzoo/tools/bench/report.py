"""What `layerzoo bench` shows: the table, the JSON file and the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import layerzoo
from layerzoo.support import json_files

from .calls import MEASURES, PIECE, STEPS
from .measure import WARMUP, Spread, gemm_size, hardware
from .peers import Peer
from .run import BenchRow, BenchSettings

HEAD = {
    "layer": "layer",
    "T": "T",
    "measure": "measure",
    "impl": "implementation",
    "ms": "ms",
    "us": "us/token",
    "ratio": "x ours (quartiles)",
    "gflops": "GFLOP/s",
    "share": "% of GEMM",
    "roof": "% of roof",
    "peak": "peak MiB",
    "difference": "differs",
}
LEFT = ("layer", "measure", "impl")


class Peaks(NamedTuple):
    """What the machine can do: GFLOP/s of a matrix product, and on a GPU bytes/s of a copy."""

    gemm: float
    copy: float | None

    def roof(self, row: BenchRow) -> float | None:
        """The time that FLOPs or bytes take at these peaks, whichever is longer, of a row's."""
        if self.copy is None or row.ms is None or row.moved is None:
            return None
        seconds = row.ms.median / 1e3
        arithmetic = (row.gflops or 0.0) / self.gemm
        return max(arithmetic, row.moved / self.copy / seconds)


class Table:
    """A plain text table, printed as its rows arrive: widths are known from the names."""

    def __init__(self, layers: Iterable[str], impls: Iterable[str], peaks: Peaks) -> None:
        self.peaks = peaks
        self.widths = {name: max(len(title), 8) for name, title in HEAD.items()}
        self.widths |= {
            "layer": max(map(len, (*layers, HEAD["layer"]))),
            "measure": max(map(len, MEASURES.values())),
            "impl": max(map(len, (*(f"{name}*" for name in impls), HEAD["impl"]))),
        }

    def head(self) -> str:
        return self.line(HEAD)

    def row(self, row: BenchRow) -> str:
        cells = {
            "layer": row.layer,
            "T": str(row.T),
            "measure": row.measure,
            "impl": row.impl + "*" * row.yardstick,
            "ms": row.ms and digits(row.ms.median),
            "us": row.us_per_token and digits(row.us_per_token),
            "ratio": row.ratio and "{:.2f} ({:.2f}-{:.2f})".format(*row.ratio),
            "gflops": row.gflops and digits(row.gflops),
            "share": row.gflops and f"{100 * row.gflops / self.peaks.gemm:.1f}",
            "roof": (share := self.peaks.roof(row)) and f"{100 * share:.1f}",
            "peak": None if row.peak is None else f"{row.peak / 2**20:.1f}",
            "difference": None if row.difference is None else f"{row.difference:.0e}",
        }
        return self.line({name: cell or "-" for name, cell in cells.items()})

    def line(self, cells: dict[str, str]) -> str:
        padded = (
            cell.ljust(self.widths[name]) if name in LEFT else cell.rjust(self.widths[name])
            for name, cell in cells.items()
        )
        return "  ".join(padded).rstrip()


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    places = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{places}f}"


def where(settings: BenchSettings) -> str:
    """Intel(R) .., 2 threads, float32"""
    threads = torch.get_num_threads()
    cpu = settings.device.type == "cpu"
    count = f", {threads} thread{'s' * (threads > 1)}" if cpu else ""
    return f"{hardware(settings.device)}{count}, {str(settings.dtype).removeprefix('torch.')}"


def describe_settings(settings: BenchSettings) -> str:
    return f"impl {settings.impl}{', compiled' * settings.compiled}"


def title(settings: BenchSettings, layers: Sequence[str]) -> str:
    """Of the picture."""
    what = layers[0] if len(layers) == 1 else settings.mode
    s = settings
    rows = f"B {s.batch}" if s.tokens is None else f"B x T {s.tokens}"
    return f"{what}: {rows}, D {s.dim}, {s.heads} heads, {describe_settings(s)}\n{where(s)}"


def header(settings: BenchSettings, peaks: Peaks) -> str:
    """What the numbers are, and of what machine."""
    s, dtype = settings, str(settings.dtype).removeprefix("torch.")
    lengths = " ".join(map(str, s.lengths))
    flops = "rule alone" if s.mode == "ops" else "whole layer"
    rows = f"B {s.batch}" if s.tokens is None else f"B x T {s.tokens}"
    size = gemm_size(s.device)
    copy = "" if peaks.copy is None else f", copy {peaks.copy / 1e12:.2f} TB/s"
    return f"""\
layerzoo bench {s.mode}: torch {torch.__version__}, {where(s)}, {describe_settings(s)}
x [B, T, D]: {rows}, T {lengths}, D {s.dim}, {s.heads} heads; \
GEMM peak {digits(peaks.gemm)} GFLOP/s ({size}^3, {dtype}){copy}

ms: median of {s.repeats} calls after {WARMUP}, the implementations in turn
us/token: of B x T tokens
x ours: their time / ours, median of the pairs; above 1 ours is faster
GFLOP/s: FLOPs of the {flops} by definition, whatever the chunk; three times as many with the
  backward
% of roof (on a GPU, ops): the time that those FLOPs take at the GEMM's peak, or the bytes of all
  inputs and outputs at a copy's, whichever is longer, over ours
peak: bytes in live tensors above those before the call
differs: largest relative difference of their output from ours
prefill: T tokens to a state, {PIECE} at a time
decode: one token a row, mean of the {STEPS} after T tokens
*: a yardstick, another function of the same shapes; -: it has none"""


def versions(peers: Iterable[Peer]) -> dict[str, str]:
    found = {"layerzoo": layerzoo.__version__, "torch": torch.__version__}
    for library in sorted({peer.library for peer in peers if peer.library}):
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a peer that was skipped
            continue
    return found


def write_json(
    path: Path, rows: Sequence[BenchRow], settings: BenchSettings, peaks: Peaks, **more: Any
) -> None:
    """All numbers, and what they are of; a row's fields are those of `BenchRow`."""
    content = {
        **more,
        "machine": {
            "device": hardware(settings.device),
            "threads": torch.get_num_threads(),
            "gemm_gflops": peaks.gemm,
            "copy_bytes_per_second": peaks.copy,
        },
        "settings": {
            **dataclasses.asdict(settings),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "device": str(settings.device),
        },
        "rows": [as_json(row, peaks) for row in rows],
    }
    json_files.write_json(path, content)


def as_json(row: BenchRow, peaks: Peaks) -> dict[str, Any]:
    """A row's fields, spreads as {median, low, high}."""
    spreads = {k: v._asdict() for k, v in vars(row).items() if isinstance(v, Spread)}
    shares = {
        "gemm_fraction": row.gflops and row.gflops / peaks.gemm,
        "roof_fraction": peaks.roof(row),
    }
    return {**vars(row), **spreads, **shares}
