"""Two layouts of codes in memory, each with its inverse.

int32, as "pack-quantized" has it: bits b*j .. b*j+b-1 of p[n, r] hold code (32/b) * r + j, for b = 4 or 8; the last word is padded with zeros.
uint8 pairs, as NVFP4 and MXFP4 have it: the low half of p[n, r] holds code 2r, the high half code 2r + 1.
"""

import torch
from torch import Tensor


def pack_int32(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """uint8 [N, K] of `bits`-bit codes -> int32, 32 / bits codes a word along `dim`, the last word padded with zeros."""
    if dim == 0:
        return pack_int32(codes.T, bits).T.contiguous()
    n, k = codes.shape
    words = -(-k * bits // 32)
    c = torch.nn.functional.pad(codes, (0, words * 32 // bits - k))
    if bits == 4:
        c = c[:, 0::2] | (c[:, 1::2] << 4)
    # little-endian: byte j of a word is its bits 8j .. 8j+7
    return c.reshape(-1).view(torch.int32).view(n, words)


def unpack_int32(packed: Tensor, bits: int, length: int, dim: int = 1) -> Tensor:
    """The inverse of `pack_int32`; `length` is the number of codes along `dim`."""
    if dim == 0:
        return unpack_int32(packed.T.contiguous(), bits, length).T.contiguous()
    c = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    return (unpack_pairs(c) if bits == 4 else c)[:, :length].contiguous()


def pack_pairs(codes: Tensor) -> Tensor:
    """uint8 [N, K] of 4-bit codes -> uint8 [N, K / 2]."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_pairs(packed: Tensor) -> Tensor:
    """The inverse of `pack_pairs`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)
