"""The rotation of keys, queries and values along head_dim: an orthonormal Hadamard matrix, block-diagonal where head_dim is not a power of two.

    R = H_b / sqrt(b) repeated along the diagonal,    H_b[i, j] = (-1) ** popcount(i & j),    b = largest power of two that divides head_dim

    head_dim  64   80       96       128   192      256
    blocks    64   5 x 16   3 x 32   128   3 x 64   256

R is symmetric and its own inverse. It spreads a channel that stands out over its block, so that one scale a token serves all; q.k does not
change when both are rotated.
"""

from functools import cache

import torch
from torch import Tensor


def block(dim: int) -> int:
    """The size of R's blocks."""
    return dim & -dim


@cache
def hadamard(dim: int) -> Tensor:
    """R for that head_dim, float32 [dim, dim]."""
    b = block(dim)
    h = torch.ones(1, 1)
    while h.shape[0] < b:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return torch.block_diag(*[h * b**-0.5] * (dim // b))


def rotate(x: Tensor) -> Tensor:
    """x R along the last dimension, in float32."""
    b = block(x.shape[-1])
    blocks = x.to(torch.float32).unflatten(-1, (-1, b))
    return (blocks @ hadamard(b).to(x.device)).flatten(-2)
