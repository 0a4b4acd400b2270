"""The fast form of MesaNet's memory in PyTorch: the systems of a chunk are solved together."""

from __future__ import annotations

import torch

from ..common.chunks import chunk_size, chunk_views, join_heads, pad_tokens
from ..common.decays import FLOOR
from ..common.matrix import per_token
from ..linear import linear_attention
from .systems import SolveSystems, magnitude

SOLVED = 2048
"""Tokens (of all rows) in a segment: the gradient holds the solver's steps of one at a time."""


def run(q, k, v, beta, log_decay, ridge, *, steps, kk, kv):
    """The solutions x first, for all tokens of a few chunks at a time (what a chunk's A_t have in
    common is the state before it); o is then linear attention with x as its queries."""
    (B, T, H, _), scaled = q.shape, beta.unsqueeze(-1) * k
    size = chunk_size(T)
    g = None
    if log_decay is not None:
        log_decay = log_decay.clamp(min=FLOOR)
        g = pad_tokens(per_token(log_decay, k), size)
    largest = magnitude(q)
    Q, Ks, Ss, Gs = chunk_views(size, *(pad_tokens(x, size) for x in (q / largest, k, scaled)), g)
    step = max(1, SOLVED // max(1, B * H * size))
    rows = ridge.repeat(B, 1).unsqueeze(1)  # [R, 1, K]
    state, solved = kk.flatten(0, 1), []
    pieces = [x.split(step) for x in (Q, Ks, Ss)]
    pieces.append([None] * len(pieces[0]) if g is None else Gs.split(step))
    for segment in zip(*pieces, strict=True):
        segment = (None if x is None else join_heads(x).contiguous() for x in segment)
        x, state = SolveSystems.apply(*segment, rows, state, steps)
        solved.append(x)
    x = torch.cat(solved).unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
    o, kv = linear_attention(largest * x, scaled, v, log_decay, state=kv, impl="chunked")
    return o, state.unflatten(0, (B, H)), kv
