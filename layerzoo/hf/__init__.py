"""Pretrained transformers with a memory in parallel (the hf extra): convert, load, and what trains
and measures them."""

from .centre import centre
from .config import LayerzooConfig
from .convert import convert, load
from .model import LayerzooForCausalLM

__all__ = ["LayerzooConfig", "LayerzooForCausalLM", "centre", "convert", "load"]
