"""Triton kernels, one module per op: `run` and `supports` (see `layerzoo.ops.Op`).

Nothing outside this folder imports triton.
"""
