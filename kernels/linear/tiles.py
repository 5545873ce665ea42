"""Which blocks a product is cut into: a table by shape class and architecture. `python -m bench.linear --tune` times the candidates.

Two things decide. How many rows of x there are: they are a block's width as long as one block can hold them. And whether the blocks of W
alone fill the GPU ("many"): where they do not ("few"), several programs share a block's K, as many as give each multiprocessor about four.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import log2

import torch

from qplugins.kernels.linear.layout import LOCKS
from qplugins.kernels.linear.spec import Spec


@dataclass(frozen=True)
class Tile:
    """block_n   rows of W, a multiple of 64
    block_m   rows of x
    step      tiles of K at a time: 64 columns each for 4-bit codes, 32 for 8-bit ones
    warps, stages   Triton's num_warps and num_stages
    split_k   programs that share a block's K
    stripe_m  blocks of x that are done before the next ones
    """

    block_n: int
    block_m: int
    step: int
    warps: int = 4
    stages: int = 4
    split_k: int = 1
    stripe_m: int = 8


# rows of x up to which it holds -> (tile for few blocks, most programs that may share K, tile for many blocks)
# found on an H100 with NVFP4 and Triton 3.6, over the layers of Llama 8B and 70B
SM_90 = (
    (8, Tile(64, 8, 4, 4, 3), 8, Tile(64, 8, 4, 4, 3)),
    (16, Tile(64, 16, 4, 4, 3), 8, Tile(64, 16, 4, 4, 3)),
    (32, Tile(64, 32, 4, 4, 3), 4, Tile(128, 32, 2, 4, 4)),
    (64, Tile(64, 64, 2, 4, 3), 4, Tile(128, 64, 2, 4, 3)),
    (128, Tile(64, 128, 1, 4, 4), 4, Tile(128, 128, 1, 8, 3)),
    (1 << 62, Tile(64, 128, 1, 4, 4), 2, Tile(128, 128, 1, 8, 3)),
)
# elsewhere nothing was measured: small blocks, which fit any GPU's registers and shared memory
DEFAULT = (
    (16, Tile(64, 16, 2, 4, 3), 8, Tile(64, 16, 2, 4, 3)),
    (32, Tile(64, 32, 2, 4, 3), 4, Tile(64, 32, 2, 4, 3)),
    (64, Tile(64, 64, 1, 4, 3), 4, Tile(64, 64, 1, 4, 3)),
    (1 << 62, Tile(64, 128, 1, 4, 3), 2, Tile(128, 128, 1, 8, 3)),
)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 132 where there is none, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _table(device: torch.device) -> tuple:
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) != (9, 0):
        return DEFAULT
    if torch.version.hip is not None:
        # one buffer fewer: 64 KiB of shared memory is all there is
        return tuple((rows, replace(few, stages=2), most, replace(many, stages=2)) for rows, few, most, many in DEFAULT)
    return SM_90


def choose(m: int, spec: Spec, device: torch.device) -> Tile:
    """The tile for a product of m rows."""
    tile = _choose(m, spec.n, -(-spec.k * spec.bits // 256), device)
    # a tile of 8-bit codes is half as wide, and a step of one would leave the tensor core too little
    return replace(tile, step=2 * tile.step) if spec.bits == 8 and m > 16 else tile


@lru_cache(maxsize=8192)
def _choose(m: int, n: int, tiles_k: int, device: torch.device) -> Tile:
    few, most, many = next(entry[1:] for entry in _table(device) if m <= entry[0])
    programs = 4 * multiprocessors(device)
    if -(-m // many.block_m) * -(-n // many.block_n) * many.warps >= programs * (1.6 if m <= 128 else 3):
        return many
    blocks_m = -(-m // few.block_m)
    # the power of two next to what fills the GPU; every share has at least four steps to fill its pipeline with
    share = 2 ** max(0, round(log2(programs / (blocks_m * -(-n // few.block_n)))))
    return replace(few, split_k=1 if blocks_m > LOCKS else max(1, min(share, most, tiles_k // few.step // 4)))
