"""Attention layers: one file or folder per layer. The ops can be imported from here."""

from .deltaformer import delta_attention
from .differential import differential_attention
from .forgetting import forgetting_attention
from .latent import latent_attention
from .sliding import sliding_attention
from .softmax import softmax_attention

__all__ = [
    "delta_attention",
    "differential_attention",
    "forgetting_attention",
    "latent_attention",
    "sliding_attention",
    "softmax_attention",
]
