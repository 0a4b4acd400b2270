"""What the chunk forms of matrix memories share: tiles, batched products, a small inverse.

A sequence is cut into chunks of C tokens. One chunk of one head is a tile `[C, D]`; tiles are
stacked as `[N, R, C, D]`, chunk first, R = B H rows. All that does not wait for the state is
batched over a segment of chunks, which is short enough to stay in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK = 32
BASE = 16
"""Smallest chunk, and the block that a triangular solver inverts: chunks are BASE 2^n."""
SEGMENT = 4096
"""Tokens (of all rows together) in a segment: 1 MiB a tensor at 64 channels in float32."""


def chunk_size(T: int) -> int:
    """Tokens a chunk; a short sequence is one chunk."""
    size = BASE
    while size < min(T, CHUNK):
        size *= 2
    return size


def pad_tokens(x: Tensor, size: int) -> Tensor:
    """`[B, T, ...]` with zero tokens at the end, up to a multiple of `size`."""
    missing = -x.shape[1] % size
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x


def chunk_views(size: int, *xs: Tensor | None) -> list[Any]:
    """Views `[N, B, H, C, D]` of `[B, T, H, D]` with T a multiple of `size`; None stays None."""
    return [None if x is None else x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4) for x in xs]


def segments(x: Float[Tensor, "N B H C D"]) -> list[slice]:
    """Slices of the N chunks."""
    N, B, H, C, _ = x.shape
    step = max(1, SEGMENT // max(1, B * H * C))
    return [slice(n, min(n + step, N)) for n in range(0, N, step)]


def join_heads(x: Float[Tensor, "n B H C D"]) -> Float[Tensor, "n R C D"]:
    """Tiles of a segment, copied together. (Never write into them: a copy is not certain.)"""
    return x.flatten(1, 2)


def write_chunks(x: Float[Tensor, "n R C D"], out: Float[Tensor, "n B H C D"]) -> None:
    """Write the tiles of a segment into a view of the whole."""
    out.copy_(x.view_as(out))


def side_by_side(*parts: Float[Tensor, "n B H C D"]) -> Float[Tensor, "n R parts C D"]:
    """Tiles of a segment, side by side: one product serves them all."""
    n, B, H, C, D = parts[0].shape
    out = parts[0].new_empty(n, B, H, len(parts), C, D)
    for place, part in zip(out.unbind(3), parts, strict=True):
        place.copy_(part)
    return out.flatten(1, 2)


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with all leading dimensions equal: a single batched product, whatever the strides."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def add_batched_matmul(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, in place, for a contiguous `out`."""
    flat = out.view(-1, *out.shape[-2:])
    flat.baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return out


def unit_lower_inverse(A: Float[Tensor, "... C C"]) -> Float[Tensor, "... C C"]:
    """(I + A)^-1 of the strictly lower part of A. The other part of A is not read.

    Halves are inverted and joined: the lower left block of the inverse is -D^-1 L A^-1.
    """
    C = A.shape[-1]
    if C <= BASE:
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    h = C // 2
    ends = unit_lower_inverse(torch.stack((A[..., :h, :h], A[..., h:, h:])))
    out = torch.zeros_like(A)
    out[..., :h, :h], out[..., h:, h:] = ends[0], ends[1]
    out[..., h:, :h] = -batched_matmul(ends[1], batched_matmul(A[..., h:, :h], ends[0]))
    return out
