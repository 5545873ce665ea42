"""The weight-only product by whichever kernel suits so many rows, and what of it is compiled while a model is loaded: without that the first
request of some length waits seconds for a compiler.

    kernel.py    few rows, on every GPU; all up to dense.LEAST_ROWS where nothing else runs
    few.py       as few as few.suits says, on Hopper
    wide.py      as many as wide.suits says, on Hopper
    dense.py     dense.LEAST_ROWS and more, elsewhere

Triton compiles a kernel anew for each block size, and which one is used depends on the number of rows. An engine's own warming up covers the
numbers of rows that it captures graphs for, and the largest; a prompt in between may need another block.
"""

from dataclasses import replace
from functools import cache, lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor

from qplugins.kernels.common.device import on_hopper
from qplugins.kernels.linear import dense, few, fp8, kernel, wide
from qplugins.kernels.linear.layout import tile_k
from qplugins.kernels.linear.spec import Plan, Shard, Spec, parse
from qplugins.kernels.linear.tiles import Tile, choose

MOST = dense.LEAST_ROWS - 1  # rows that kernel.py has
MOST_WIDE = 8192  # rows; for more of them wide.py's blocks stay the same
_done: set[tuple] = set()


@lru_cache(maxsize=8192)
def module_for(m: int, spec: Spec, device: torch.device, by_tma: bool = True) -> ModuleType:
    """Which of the modules above multiplies m rows of x. by_tma: whether x and y lie as wide.py's TMA wants it."""
    if few.suits(m, spec, device):
        return few
    if by_tma and wide.suits(m, spec):
        return wide
    return dense if m >= dense.LEAST_ROWS else kernel


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias, with W in the `tiles` layout; see the modules above. M > 0."""
    module = module_for(x.shape[0], spec, x.device)
    if module is wide and wide.refuses(spec, x, out) is not None:
        module = module_for(x.shape[0], spec, x.device, by_tma=False)
    module.linear(x, spec, tensors, out, bias)


@cache
def variants(spec: Spec, device: torch.device) -> dict[tuple[Tile, bool, bool], int]:
    """What of kernel.py is compiled for up to MOST rows -> the least number of rows that it runs for. A key is a tile, but for what it is not
    compiled for, whether programs share a block's K, and whether it is launched early."""
    found: dict[tuple[Tile, bool, bool], int] = {}
    # every number of rows up to 128, then one of each 64, which no block of more rows divides
    for m in (*range(1, 129), *range(129, MOST + 1, 64)):
        tile = choose(m, spec, device)
        _, split, _, early = kernel.schedule(m, spec, tile, device)
        found.setdefault((replace(tile, split_k=1, stripe_m=1), split > 1, early), m)
    return found


@cache
def wide_variants(spec: Spec, device: torch.device) -> dict[wide.WideTile, int]:
    """The same of wide.py, for up to MOST_WIDE rows."""
    found: dict[wide.WideTile, int] = {}
    # one of each 32 and later of each 128, which no block of more rows divides, and where x no longer stays in the cache
    most_cached = int(wide.CACHE // (2 * spec.k))
    for m in (*range(32, 256, 32), *range(256, MOST_WIDE + 1, 128), most_cached, most_cached + 1):
        if m <= MOST_WIDE and wide.suits(m, spec):
            found.setdefault(replace(wide.choose(m, spec, device), stripe_m=1), m)
    return found


def _run_once(
    module, m: int, *compiled_for: object, shard: Shard, layer: Plan, tensors: list[Tensor], dtype: torch.dtype, bias: bool
) -> None:
    """module.linear for m rows of zeros and a shard's columns of the layer's y, if it has not run for these."""
    spec, device, columns = shard.spec, tensors[0].device, slice(shard.start, shard.start + shard.spec.n)
    # also compiled for: which sizes, and where y's and the bias' columns begin, are multiples of 16, or of 16 bytes
    multiples = spec.k % 16 == 0, spec.n % 16 == 0, layer.n % 16 == 0, shard.start % 8 == 0
    key = (device, dtype, bias, replace(spec, n=0, k=0), module, multiples, *compiled_for)
    if key not in _done:
        _done.add(key)
        x, y = torch.zeros(m, spec.k, dtype=dtype, device=device), torch.empty(m, layer.n, dtype=dtype, device=device)
        b = torch.zeros(layer.n, dtype=dtype, device=device)[columns] if bias else None
        module.linear(x, spec, tensors, y[:, columns], b)


def warm(plan: str, tensors: list[Tensor], dtype: torch.dtype, bias: bool) -> None:
    """Runs our kernels for the shards of a plan, once for each variant that no call before had. Nothing happens off the GPU.

    tensors  of all shards       dtype  of x       bias  whether the layer has one
    """
    layer = parse(plan)
    for shard in layer.shards:
        own = tensors[shard.first : shard.first + shard.count]
        if own[0].device.type != "cuda":
            continue
        spec, device = shard.spec, own[0].device
        if shard.implementation == "scaled_mm":
            fp8.warm(spec, own, dtype, bias)
        if shard.implementation != "triton":
            continue
        once = partial(_run_once, shard=shard, layer=layer, tensors=own, dtype=dtype, bias=bias)
        # as TMA wants it, see wide.refuses
        by_wide = on_hopper() and spec.k % 8 == 0 and layer.n % 8 == 0 and shard.start % 8 == 0
        if few.suits(1, spec, device):
            once(few, 1, few.stages_of(spec, device), spec.k % (few.WARPS * few.STEP * tile_k(spec)) == 0)
        for (tile, shared, early), m in variants(spec, device).items():
            if not (few.suits(m, spec, device) or (by_wide and wide.suits(m, spec))):
                once(kernel, m, tile, shared, early, spec.k % (tile.step * tile_k(spec)) == 0)  # whether steps divide K
        for tile, m in wide_variants(spec, device).items() if by_wide else ():
            once(wide, m, tile)
        key = (device, dtype, replace(spec, n=0, k=0), spec.k % (dense.TILE.step * tile_k(spec)) == 0, spec.k % 16 == 0)
        if key not in _done:
            _done.add(key)
            dense.decode(spec, own, 0, torch.empty(min(spec.n, 64), spec.k, dtype=dtype, device=device))
