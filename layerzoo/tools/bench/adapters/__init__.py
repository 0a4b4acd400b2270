"""Adapters: how the benchmark calls the libraries that it times ours against. Each registers
itself as a peer when it is imported."""

from layerzoo.tools.bench.adapters import attention, memories, memories_gpu

__all__ = ["attention", "memories", "memories_gpu"]
