"""What a converted model costs at a length, beside the full attention that it was made of."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerzoo.hf.convert import load
from layerzoo.hf.model import PIECE
from layerzoo.hf.modes import mode
from layerzoo.tools.bench.stream import Point, Stream, held, in_a_process, points, resident

STEPS = 16


class MeasuredCost(NamedTuple):
    """At a length: FLOPs of the prefill by count, seconds that it took, bytes of the cache,
    milliseconds of a token after it (median), and how much more memory the process holds than
    before."""

    mode: str
    length: int
    prefill_flops: float
    prefill_seconds: float
    cache_bytes: int
    ms_per_token: float
    resident_bytes: int


def cost(path: str, name: str, length: int, threads: int) -> MeasuredCost:
    """Measured in a process of its own, whose memory holds nothing of another's."""
    return in_a_process(measure, path, name, length, threads)


@torch.no_grad()
def measure(path: str, name: str, length: int, threads: int) -> MeasuredCost:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = load(path)
    with mode(model, name):
        return measured(model, name, length)


def measured(model: Any, name: str, length: int) -> MeasuredCost:
    tokens = torch.randint(model.config.vocab_size, (1, length))
    before, clock = resident(), time.perf_counter()
    state: Any = None
    for piece in tokens.split(PIECE, 1):
        _, state = model.hidden(piece, state)
    seconds, size = time.perf_counter() - clock, held(state)
    times, token = [], tokens[:, -1:]
    for _ in range(STEPS):
        clock = time.perf_counter()
        h, state = model.hidden(token, state)
        token = next_of(model.head(h[:, -1:]))
        times.append(1e3 * (time.perf_counter() - clock))
    flops = model.flops_per_token(length) * length
    return MeasuredCost(name, length, flops, seconds, size, median(times), resident() - before)


def generated(path: str, tokens: int, threads: int) -> list[Point]:
    """A stream that samples so many tokens, looked at two hundred times."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model: Any = load(path)
    arm = Stream("", 0, 0, tokens, max(1, tokens // 200), threads)
    return list(points(model, arm))


def next_of(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def table(costs: list[MeasuredCost]) -> str:
    lines = [
        "| length | model | prefill, GFLOP | prefill, s | cache, MiB | ms a token | memory, MiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in costs:
        lines.append(
            f"| {one.length:,} | {one.mode} | {one.prefill_flops / 1e9:,.0f} | "
            f"{one.prefill_seconds:.1f} | {one.cache_bytes / 2**20:.1f} | "
            f"{one.ms_per_token:.0f} | {one.resident_bytes / 2**20:,.0f} |"
        )
    return "\n".join(lines)
