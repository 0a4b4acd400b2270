"""`layerzoo bench generate SPEC ...`: memory and time per token of one long generation.

Every arm is a small model of random weights that samples token after token in a process of its
own. What is measured is that process: its resident memory and its clock.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from layerzoo.generation.decode import stream
from layerzoo.model import LanguageModel
from layerzoo.spec import Spec, SpecError
from layerzoo.support.arguments import PICTURES, CommandParser, check_file, spec_of
from layerzoo.support.json_files import write_json

from .command import positive
from .measure import hardware

STATM = Path("/proc/self/statm")
VOCAB = 256
MIB = 2**20


class Point(NamedTuple):
    """After so many new tokens: bytes of resident memory and of the state, and milliseconds a
    token, the mean since the point before: of the clock, and of the processor, in which other
    programs of the machine do not show."""

    tokens: int
    rss: int
    state: int
    ms: float
    cpu_ms: float


class Stream(NamedTuple):
    """What one process runs."""

    spec: Spec
    dim: int
    depth: int
    tokens: int
    every: int
    threads: int


def label_of(spec: dict[str, Any]) -> str:
    """sliding+allmem for a composition, else the name."""
    children = [c if isinstance(c, str) else c["name"] for c in spec.get("children", ())]
    return "+".join(children) or spec["name"]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(state: Any) -> int:
    """Bytes of a state's tensors."""
    return sum(x.nbytes for x in tree_leaves(state) if isinstance(x, Tensor))


def measure(arm: Stream) -> list[Point]:
    """Generate, and look every `every` tokens."""
    torch.manual_seed(0)
    torch.set_num_threads(arm.threads)
    fields = {"vocab_size": VOCAB, "dim": arm.dim, "depth": arm.depth, "layers": [arm.spec]}
    model = LanguageModel(**fields).eval()
    return list(points(model, arm))


def points(model: LanguageModel, arm: Stream) -> Iterator[Point]:
    tokens = stream(model, [0], arm.tokens, temperature=1.0)
    clock, cpu, last = time.perf_counter(), time.process_time(), 0
    for n, _ in enumerate(tokens, 1):
        if n % arm.every and n < arm.tokens:
            continue
        now = time.perf_counter(), time.process_time()
        each = 1e3 / (n - last)
        yield Point(
            n, resident(), held(tokens.state), each * (now[0] - clock), each * (now[1] - cpu)
        )
        clock, cpu, last = time.perf_counter(), time.process_time(), n


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Its result in a fresh process, whose memory holds nothing of another call."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *args).result()


def table(label: str, found: Sequence[Point], lines: int = 10) -> str:
    """Every tenth of the run, each with the median times of its tenth."""
    names = f"{'tokens':>9}{'RSS, MiB':>11}{'state, KiB':>13}{'ms/token':>11}{'CPU ms':>9}"
    step = -(-len(found) // lines)
    rows = [label, names]
    for n in range(0, len(found), step):
        part = found[n : n + step]
        last, ms, cpu = part[-1], median(p.ms for p in part), median(p.cpu_ms for p in part)
        sizes = f"{last.tokens:>9,}{last.rss / MIB:>11.1f}{last.state / 1024:>13,.1f}"
        rows.append(f"{sizes}{ms:>11.2f}{cpu:>9.2f}")
    return "\n".join(rows)


def growth(found: Sequence[Point]) -> str:
    """What has changed since a tenth of the run."""
    late = found[max(0, len(found) // 10 - 1) :]
    sizes = [p.rss for p in late]
    fifth = max(1, len(late) // 5)
    first, last = (median(p.cpu_ms for p in part) for part in (late[:fifth], late[-fifth:]))
    return (
        f"from {late[0].tokens:,} to {late[-1].tokens:,} tokens: RSS {late[0].rss / MIB:.1f} -> "
        f"{late[-1].rss / MIB:.1f} MiB, largest / smallest {max(sizes) / min(sizes):.4f}; "
        f"CPU ms/token {first:.2f} -> {last:.2f} (medians of the first and last fifth)"
    )


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "layerzoo bench generate",
        description="Memory and time per token of one long generation, random weights.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("specs", metavar="SPEC", nargs="*", help="run this layer, or a spec as '{name: ..}'")
    add(
        "--tokens",
        metavar="N,..",
        type=positives,
        default=[100_000],
        help="generate N tokens, one number for all arms or one for each (default 100000)",
    )
    for name, default, text in (
        ("every", 500, "measure after every N tokens"),
        ("dim", 64, "give the model a width of N"),
        ("depth", 2, "give the model N blocks"),
        ("threads", 1, "use N threads of the CPU"),
    ):
        add(
            f"--{name}",
            metavar="N",
            type=positive,
            default=default,
            help=f"{text} (default {default})",
        )
    add("--json", metavar="FILE", type=Path, help="write all numbers")
    add("--plot", metavar="FILE", type=Path, help=f"draw both ({' '.join(PICTURES)})")
    options = parser.parse_args(argv)
    if not options.specs:
        parser.error("give at least one SPEC, such as softmax")
    if not STATM.is_file():
        raise SpecError("bench generate: reads resident memory from /proc; it needs Linux")
    check_file("--json", options.json)
    check_file("--plot", options.plot, PICTURES)
    counts = options.tokens * (len(options.specs) if len(options.tokens) == 1 else 1)
    if len(counts) != len(options.specs):
        raise SpecError(f"--tokens: {len(counts)} numbers for {len(options.specs)} arms")
    arms: dict[str, Stream] = {}
    for text, tokens in zip(options.specs, counts, strict=True):
        spec = spec_of(text)
        name = label_of(spec)
        LanguageModel(vocab_size=1, dim=options.dim, layers=[spec])  # refuse a bad one at once
        arms[name if name not in arms else text] = Stream(
            spec, options.dim, options.depth, tokens, options.every, options.threads
        )
    what = (
        f"torch {torch.__version__}, {hardware(torch.device('cpu'))}, threads {options.threads}, "
        f"dim {options.dim}, depth {options.depth}, vocabulary {VOCAB}, float32, sampled"
    )
    print(f"layerzoo bench generate: {what}")
    runs: dict[str, list[Point]] = {}
    for name, arm in arms.items():
        runs[name] = found = in_a_process(measure, arm)
        print(f"\n{table(name, found)}\n{growth(found)}", flush=True)
    if options.json:
        rows = {name: [p._asdict() for p in found] for name, found in runs.items()}
        write_json(options.json, {"what": what, "runs": rows})
    if options.plot:
        importlib.import_module("layerzoo.tools.bench.stream_plot").plot(what, runs, options.plot)
    return 0
