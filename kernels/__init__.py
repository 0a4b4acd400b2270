"""Triton kernels, one file per op: `run` and `supports` (see `layerzoo.ops.Op`).

Nothing outside this folder imports triton. There is no kernel yet: `impl="triton"` says so.
"""
