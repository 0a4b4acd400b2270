"""How the benchmarks measure: time in pairs, peak memory, and the machine's own peak."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
WARMUP = 2
GEMM = 1024
FLUSH = 2**31
"""Bytes: more than a GPU's cache holds, and half a millisecond of writing."""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of pairs that ran one after the other, how many times our time theirs is."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stopwatch(device: torch.device) -> Callable[[Call], float]:
    """Measures the seconds of a call. On a GPU by its own events, from a cold cache; while that is
    flushed, the call's first kernels are queued, so that launching them is not measured."""
    if device.type != "cuda":
        return seconds
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(call: Call) -> float:
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, whose pauses (and whose freed tensors) are not the call's."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def alternate(
    calls: Sequence[Call], repeats: int, timed: Callable[[Call], float] = seconds
) -> list[list[float]]:
    """Seconds of each call, A B A B .., after `WARMUP` rounds that are not timed.

    A slow phase of the machine meets all of them: the ratio of neighbours is steadier than the
    times themselves.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(WARMUP):
        for call in calls:
            call()
    with no_collection():
        for _ in range(repeats):
            for call, found in zip(calls, times, strict=True):
                found.append(timed(call))
    return times


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak of the bytes in live tensors during the call, above what was live before it.

    On the CPU it is the running sum of the allocator's events. What a library takes elsewhere
    (workspaces of a BLAS) is not in it, nor that older tensors are freed.
    """
    with no_collection():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it narrates on stderr
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    return _highest_sum(_allocations(profiler))


def _allocations(profiler: Any) -> Iterator[int]:
    """The allocator's events in time: bytes, negative where they were freed."""
    events = profiler.profiler.kineto_results.events()
    found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return (size for _, size in sorted(found, key=lambda event: event[0]))


def _highest_sum(sizes: Iterable[int]) -> int:
    live = highest = 0
    for size in sizes:
        live += size
        highest = max(highest, live)
    return highest


def gflops(flops: float, milliseconds: float) -> float:
    """10^9 FLOPs a second."""
    return flops / milliseconds / 1e6


def gemm_size(device: torch.device) -> int:
    """Of the matrices whose product is the peak: a GPU is not busy with small ones."""
    return 8 * GEMM if device.type == "cuda" else GEMM


def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of the fastest of 20 products of two square matrices; fewer, if a second is up."""
    size, timed = gemm_size(device), stopwatch(device)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    ((first,),) = alternate([lambda: a @ b], 1, timed)
    (times,) = alternate([lambda: a @ b], max(1, min(20, int(1 / first))), timed)
    return gflops(2 * size**3, 1e3 * min(times))


def copy_peak(device: torch.device) -> float | None:
    """Bytes a second, read and written, of the fastest of 20 copies on a GPU."""
    if device.type != "cuda":
        return None
    a = torch.randn(2**28, device=device)
    b = torch.empty_like(a)
    (times,) = alternate([lambda: b.copy_(a)], 20, stopwatch(device))
    return 2 * a.nbytes / min(times)


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest entry; infinite for other shapes."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")  # a NaN is no agreement


def hardware(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
