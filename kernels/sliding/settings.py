"""Tiles, warps and stages of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import launch


class Setting(NamedTuple):
    """BM queries by BN keys."""

    BM: int
    BN: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        return {
            "BM": self.BM,
            "BN": self.BN,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def settings(kernel: str, size: int, dtype: torch.dtype, target: launch.Target) -> Setting:
    """For heads of `size` channels, padded: the larger of K and V.

    A block of BM queries computes window + BM keys a query: a BM of 64 computes an eighth too
    much at a window of 512, one of 128 a quarter. On Hopper four warps with 64 rows, two or three
    programs a multiprocessor, were the fastest of the tiles that were tried."""
    wide = dtype == torch.float32
    if wide:  # products are multiply-adds of the ordinary units: small tiles, little to overlap
        table = {
            "forward": ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
            "backward_q": ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
            "backward_kv": ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
            "backward_sinks": ((32, 16, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1)),
            "decode": ((16, 32, 4, 3), (16, 16, 4, 3), (16, 16, 4, 2)),
        }
    elif target.backend == "hip":
        table = {
            "forward": ((128, 64, 4, 2), (128, 64, 4, 1), (64, 32, 4, 1)),
            "backward_q": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
            "backward_kv": ((32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
            "backward_sinks": ((64, 16, 4, 1), (64, 16, 4, 1), (32, 16, 4, 1)),
            "decode": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
        }
    elif target.arch == 80:
        table = {
            "forward": ((64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 2)),
            "backward_q": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
            "backward_kv": ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)),
            "backward_sinks": ((64, 16, 4, 2), (64, 16, 4, 2), (32, 16, 4, 2)),
            "decode": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        }
    else:
        table = {
            "forward": ((64, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 2)),
            "backward_q": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
            "backward_kv": ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 8, 1)),
            "backward_sinks": ((64, 16, 4, 2), (64, 16, 4, 2), (32, 16, 4, 2)),
            "decode": ((16, 64, 4, 4), (16, 64, 4, 3), (16, 32, 4, 3)),
        }
    return Setting(*table[kernel][0 if size <= 64 else 1 if size <= 128 else 2])
