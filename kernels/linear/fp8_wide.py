"""FP8 products on Hopper whose weights arrive while the quantizer still runs, and whose programs share K where y has too few blocks to fill the GPU.

fp8_few.py's product for more rows, put together as wide.py is: y.T = W q.T, and a ring of STAGES buffers in shared memory, each with 128 columns of
BLOCK_N rows of W and of BLOCK_M rows of q.

    the loader   asks for W's part of the first buffers, waits for the quantizer, and asks for q's part of them; then for both, buffer after buffer
    consumers    four warps for each 64 rows of W multiply what is in a buffer and add that to their sum, for themselves: while some add, others
                 have the tensor core. It adds e4m3 products in fewer bits than float32 has, so no more of them than one buffer's

This comes up beside the kernel in front of it, which has to be the quantizer, or another that waits for its own predecessor before it lets this
one come up: so W is read only when whoever wrote it is done. `after_previous` says what that costs kernels of which programs share a
multiprocessor; of this one's, each needs nearly all of one's shared memory.

torch._scaled_mm cuts y into blocks of 128 x 128, so that it takes as long for 133 of them as for 264; this is for where that leaves many
multiprocessors idle, and for few rows. On an H100 what `suits` picks took, with the quantizer and over eight layers of Llama 8B and 70B, 0.81 to 1.0 of
the time of the quantizer and torch._scaled_mm for 48 to 1,024 rows of x, and 1.16 at worst (bench/results/fp8_tiles.json).
"""

from dataclasses import replace
from functools import cache, lru_cache
from math import inf

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qplugins.kernels.common.device import after_previous, on_hopper
from qplugins.kernels.common.launch import Launcher, Place
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import cdiv, multiprocessors
from qplugins.kernels.linear.wide import (
    CACHE,
    ROWS,
    SHARED_MEMORY,
    SWIZZLED,
    WideTile,
    _advance,
    _join_parts,
    _store,
    boxes_there,
    busiest,
    expect_rows,
    load_rows,
    own_piece,
    schedule,
    share_out,
    tma_load,
    unaligned,
)

BYTES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)  # rows of 128 e4m3 values: q and W


@gluon.constexpr_function
def acc_layout(columns, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 32])


@gluon.jit
def _loader(sources, sizes, buffers, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SHARED_K: gl.constexpr):
    """Fills the ring for all of a program's blocks."""
    q, part_of_q, M, weight = sources
    blocks_m, blocks_n, steps, alone, share, stripe_m = sizes
    q_buf, w_buf, full, empty = buffers
    NBYTES: gl.constexpr = PARTS * weight.block_type.nbytes
    program = gl.program_id(0)
    programs = gl.num_programs(0)

    # no kernel writes W: what the first piece of work takes of it, as far as there are buffers
    _, block_m, block_n, first, count = own_piece(0, blocks_m, blocks_n, steps, alone, share, stripe_m)
    ahead = gl.minimum(count, STAGES)
    there = boxes_there(part_of_q, block_m * BLOCK_M, M, BLOCK_M)
    for i in range(ahead):
        expect_rows(q, part_of_q, full.index(i), there, BLOCK_M, NBYTES)
        for part in gl.static_range(PARTS):
            tma_load(weight, [(block_n * PARTS + part) * 64, (first + i) * 128], full.index(i), w_buf.index(i * PARTS + part))
    after_previous(True)

    stage = 0
    phase = 1  # but for that, the ring is empty
    for piece in range(gl.cdiv(alone - program, programs) + 2 * SHARED_K):
        block, block_m, block_n, first, count = own_piece(piece, blocks_m, blocks_n, steps, alone, share, stripe_m)
        there = boxes_there(part_of_q, block_m * BLOCK_M, M, BLOCK_M)
        for step in range(first, first + count):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            expect_rows(q, part_of_q, bar, there, BLOCK_M, NBYTES, ahead <= 0)
            for part in gl.static_range(PARTS):
                at = [(block_n * PARTS + part) * 64, step * 128]
                tma_load(weight, at, bar, w_buf.index(stage * PARTS + part), pred=ahead <= 0)
            load_rows(q, part_of_q, block_m * BLOCK_M, step * 128, bar, q_buf.index(stage), there, BLOCK_M)
            ahead -= 1
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _consumers(
    result, sizes, buffers, part: gl.constexpr, PARTS: gl.constexpr, BIAS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SHARED_K: gl.constexpr,
):  # fmt: skip
    """Empty the ring into 64 columns of each block of y. part: which of PARTS."""
    y, scale, row, bias, work, locks, M, N, stride_row, y_buf = result
    blocks_m, blocks_n, steps, alone, share, stripe_m = sizes
    q_buf, w_buf, full, empty = buffers
    layout: gl.constexpr = acc_layout(BLOCK_M, gl.num_warps())
    y_buf = y_buf.index(part)
    after_previous(True)  # what the loader waits for does not order these threads' reads of scale and locks

    stage = 0
    phase = 0
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    work += part * 2 * programs * (64 * BLOCK_M)
    locks += part * programs
    for piece in range(gl.cdiv(alone - program, programs) + 2 * SHARED_K):
        block, block_m, block_n, first, count = own_piece(piece, blocks_m, blocks_n, steps, alone, share, stripe_m)
        block_n = block_n * PARTS + part  # now of 64 columns
        # what storing takes, before it is waited for; of scale a thread has few values until then
        n = block_n * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        factor = gl.load(row + n * stride_row, mask=n < N, other=0.0)
        offset = 0.0
        if BIAS:
            offset = gl.load(bias + n, mask=n < N, other=0.0)
        m = block_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        scales = gl.load(scale + m, mask=m < M, other=0.0)

        acc = gl.zeros([64, BLOCK_M], gl.float32, layout)
        for _ in range(count):
            mbarrier.wait(full.index(stage), phase)
            w, qt = w_buf.index(stage * PARTS + part), q_buf.index(stage).permute([1, 0])
            product = warpgroup_mma(w, qt, gl.zeros([64, BLOCK_M], gl.float32, layout), use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            acc += product
            stage, phase = _advance(stage, phase, STAGES)

        whole = count == steps
        if SHARED_K:
            if (count > 0) & (count < steps):
                acc, whole = _join_parts(acc, work, locks, block, steps, alone, share, 64, BLOCK_M)
            if whole:
                acc *= gl.convert_layout(scales, gl.SliceLayout(0, layout))[None, :]
                _store(acc, factor, offset, y, y_buf, block_m, block_n, 1.0, BIAS, 64, BLOCK_M)
        else:
            acc *= gl.convert_layout(scales, gl.SliceLayout(0, layout))[None, :]
            _store(acc, factor, offset, y, y_buf, block_m, block_n, 1.0, BIAS, 64, BLOCK_M)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "stride_row", "steps", "alone", "share", "stripe_m"])
def fp8_wide_kernel(
    q, part_of_q, scale, weight, row, bias, y, work, locks, M, N, stride_row, steps, alone, share, stripe_m,
    BIAS: gl.constexpr, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SHARED_K: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """y[m, n] = scale[m] row[n] sum_k q[m, k] weight[n, k] + bias[n]. Programs have blocks of BLOCK_M rows and 64 * PARTS columns of y, and share
    those past `alone`, as in wide_kernel.

    TMA descriptors, with the blocks that are read or written at a time:
    q, part_of_q  e4m3 [M, K], both q, [BLOCK_M, 128] and fewer rows        weight  e4m3 [N, K], [64, 128]        y  [M, N], [BLOCK_M, 64]

    scale  float32 [M]        row  float32 [N], or one for all with stride_row 0        bias  [N]        steps  of 128 columns, that cover K
    work   float32 [PARTS, 2 * num_programs, 64, BLOCK_M]        locks  int32 [PARTS, num_programs], zeros
    REGISTERS  of a consumer's thread
    """
    q_buf = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, 128], q.layout)
    w_buf = gl.allocate_shared_memory(weight.dtype, [STAGES * PARTS, 64, 128], weight.layout)
    y_buf = gl.allocate_shared_memory(y.dtype, [PARTS, BLOCK_M, 64], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    fence_async_shared()

    buffers = (q_buf, w_buf, full, empty)
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, 64 * PARTS), steps, alone, share, stripe_m)
    result = (y, scale, row, bias, work, locks, M, N, stride_row, y_buf)
    # warps and registers of those that do not come first
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consumers, (result, sizes, buffers, 0, PARTS, BIAS, BLOCK_M, STAGES, SHARED_K)),
                (_consumers, (result, sizes, buffers, 1, PARTS, BIAS, BLOCK_M, STAGES, SHARED_K)),
                (_loader, ((q, part_of_q, M, weight), sizes, buffers, PARTS, BLOCK_M, STAGES, SHARED_K)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumers, (result, sizes, buffers, 0, PARTS, BIAS, BLOCK_M, STAGES, SHARED_K)),
                (_consumers, (result, sizes, buffers, 1, PARTS, BIAS, BLOCK_M, STAGES, SHARED_K)),
                (_consumers, (result, sizes, buffers, 2, PARTS, BIAS, BLOCK_M, STAGES, SHARED_K)),
                (_loader, ((q, part_of_q, M, weight), sizes, buffers, PARTS, BLOCK_M, STAGES, SHARED_K)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


# with the cycles that 128 columns of K take; the tensor core alone would take block_n * block_m / 32. bench/wide_tiles.py fitted these and the other
# constants to bench/results/fp8_tiles.json, of an H100. Tiles of 64 rows of W were 2 % quicker than the best of these at most
TILES = (
    (WideTile(128, 32), 481),
    (WideTile(128, 64), 588),
    (WideTile(128, 128), 825),
    (WideTile(192, 128), 1054),
)
BLOCK = -1175  # cycles that a block, or a part of one, takes besides; less than none, as START has too many
SUM = 28.1  # bytes of sums that are left or added up in a cycle
START = 8966  # cycles besides where W comes later than it could be multiplied
MEMORY = 11.9  # bytes of W in a cycle, of a multiprocessor's share of the memory's bandwidth
SHARED = 128  # rows of a block from which on programs share K: with fewer it cost more than it gained
LEAST = 33  # rows; fp8_few.py is for fewer
SURE = 64  # rows up to which this was quicker than torch._scaled_mm for every layer
MOST = 1024  # and up to here it may be. With more the GPU slows down for want of power, and this kernel the more
SCALED_BLOCK = 128  # rows and columns of the blocks that torch._scaled_mm cuts y into
SCALED_STEP = 746  # cycles that torch._scaled_mm takes for 128 columns of K
SCALED_START = 4730  # and besides


@cache
def blocks_of(tile: WideTile) -> dict[str, tuple[list[int], gl.NVMMASharedLayout]]:
    """What TMA reads and writes at a time, and how it lies in shared memory: argument -> (block, layout)."""
    return {
        "q": ([tile.block_m, 128], BYTES),
        "part_of_q": ([min(ROWS, tile.block_m), 128], BYTES),
        "weight": ([64, 128], BYTES),
        "y": ([tile.block_m, 64], SWIZZLED),
    }


def constants(tile: WideTile) -> dict:
    """What the kernel is compiled for."""
    parts = tile.block_n // 64
    # the loader comes with four warps' registers, keeps 24 of each thread's, and gives the others to the consumers. They have two sums and what
    # else there is, or what is left
    maxnreg = min(cdiv((tile.block_m + 48) * parts + 24, 8 * (parts + 1)) * 8, 65536 // (128 * (parts + 1)))
    return {
        "PARTS": parts,
        "BLOCK_M": tile.block_m,
        # as many buffers as there is room for; they begin at multiples of 1 KiB
        "STAGES": (SHARED_MEMORY - 1024 - 2 * tile.block_n * tile.block_m) // ((tile.block_n + tile.block_m) * 128 + 16),
        "SHARED_K": tile.shared,
        "REGISTERS": (maxnreg * (parts + 1) - 24) // parts // 8 * 8,
        "num_warps": 4,
        "maxnreg": maxnreg,
    }


def cycles_of_scaled_mm(m: int, n: int, k: int, sms: int, step: float = SCALED_STEP, start: float = SCALED_START) -> float:
    """What torch._scaled_mm takes, which has one block of y a multiprocessor at a time."""
    rounds = cdiv(cdiv(m, SCALED_BLOCK) * cdiv(n, SCALED_BLOCK), sms)
    return max(rounds * cdiv(k, 128) * step, n * k / (MEMORY * sms)) + start


def cycles(
    tile: WideTile, step: float, m: int, n: int, k: int, sms: int,
    block: float = BLOCK, sums: float = SUM, start: float = START, memory: float = MEMORY,
) -> float:  # fmt: skip
    """What the busiest multiprocessor takes for m rows of q and W[n, k], or the memory for W; infinite where the tile cannot be used.

    step, block, sums, start, memory  as TILES, BLOCK, SUM, START and MEMORY have them
    """
    blocks, steps = cdiv(m, tile.block_m) * cdiv(n, tile.block_n), cdiv(k, 128)
    own, besides = busiest(tile, blocks, steps, sms, block, sums)
    by_memory = n * k / (memory * sms)
    if tile.shared and own < inf and m > tile.block_m and n * k > CACHE:
        # programs that share are at different columns of W, so that each reads its rows for itself, where W does not stay in the L2 cache
        alone, share = share_out(blocks, steps, sms)
        if share < steps:
            besides += max(0, (blocks - alone) * tile.block_n * k / (memory * sms) - share * step)
    last = blocks % sms
    if last and blocks > sms and not tile.shared:
        # the last blocks' programs are too few to ask for W as fast as it could come
        by_memory = max(by_memory, by_memory * (1 - last / blocks) + steps * step)
    return max(own * step, start + by_memory) + besides


def usable(tile: WideTile, m: int) -> bool:
    """Whether the tile is one for m rows: W comes late for three and more blocks of 32."""
    return m <= 64 or tile.block_m > 32


@lru_cache(maxsize=8192)
def quickest(m: int, spec: Spec, device: torch.device) -> tuple[float, WideTile]:
    """(cycles that the model has for it, the tile with which the product is done first)."""
    candidates = [
        (replace(tile, shared=shared), step) for tile, step in TILES for shared in (False, tile.block_m >= SHARED) if usable(tile, m)
    ]
    timed = ((cycles(*entry, m, spec.n, spec.k, multiprocessors(device)), entry[0]) for entry in candidates)
    return min(timed, key=lambda found: found[0])


def choose(m: int, spec: Spec, device: torch.device) -> WideTile:
    """The tile with which the product is done first."""
    return quickest(m, spec, device)[1]


def suits(m: int, spec: Spec, device: torch.device) -> bool:
    """Whether this is quicker for m rows than torch._scaled_mm: for few it was, and for more by the model, where blocks of 128 x 128 leave many
    multiprocessors idle in the end."""
    if not SURE < m <= MOST:
        return LEAST <= m <= SURE
    return quickest(m, spec, device)[0] < cycles_of_scaled_mm(m, spec.n, spec.k, multiprocessors(device))


@cache
def variants(spec: Spec, device: torch.device) -> dict[WideTile, int]:
    """Every tile that runs -> a number of rows that it runs for."""
    found: dict[WideTile, int] = {}
    for m in range(64, MOST + 1, 32):  # numbers that need the same blocks of any tile count as one
        if suits(m, spec, device):
            found.setdefault(choose(m, spec, device), m)
    return found


def refuses(spec: Spec, out: Tensor) -> str | None:
    """Why `linear` cannot compute out, as a sentence; None where it can."""
    if not on_hopper():
        return "the kernel is made for Hopper"
    if spec.k % 16:
        return f"TMA wants rows of whole 16 bytes; K = {spec.k} is not a multiple of 16"
    return unaligned("out", out)


@lru_cache(maxsize=8192)
def rows_by_tma(spec: Spec, tile: WideTile, m: int, q: Place, y: Place, stride_y: int) -> dict[str, TensorDescriptor]:
    """Descriptors of q and y, by argument."""
    of = {"q": (q, spec.k, spec.k), "part_of_q": (q, spec.k, spec.k), "y": (y, spec.n, stride_y)}
    return {a: TensorDescriptor(place, [m, n], [stride, 1], *blocks_of(tile)[a]) for a, (place, n, stride) in of.items()}


@lru_cache(maxsize=8192)
def weight_by_tma(spec: Spec, tile: WideTile, weight: Place) -> TensorDescriptor:
    return TensorDescriptor(weight, [spec.n, spec.k], [spec.k, 1], *blocks_of(tile)["weight"])


@cache
def _launcher(tile: WideTile, bias: bool) -> Launcher:
    return Launcher(fp8_wide_kernel, **constants(tile), BIAS=bias, launch_pdl=True)


def linear(
    q: Tensor, scale: Tensor, weight: Tensor, row: Tensor, spec: Spec, locks: Tensor, out: Tensor, bias: Tensor | None = None,
    tile: WideTile | None = None,
) -> None:  # fmt: skip
    """out[M, N] = q * scale @ (weight * row).T + bias, see `fp8_wide_kernel`. `refuses` has nothing against out; M > 0.

    locks  zeros, and they stay so
    tile   None: by the sizes
    Raises ValueError where there are fewer locks than a block's parts for each program.
    """
    m, n = q.shape[0], spec.n
    tile = tile or choose(m, spec, q.device)
    blocks, steps = cdiv(m, tile.block_m) * cdiv(n, tile.block_n), cdiv(spec.k, 128)
    programs, alone, share = schedule(blocks, steps, tile.shared, multiprocessors(q.device))
    work = row
    if tile.shared:
        if programs * tile.block_n // 64 > locks.numel():
            raise ValueError(f"{programs} programs share K with a tile {tile}, and there are {locks.numel()} locks")
        work = torch.empty(2 * programs * tile.block_n * tile.block_m, dtype=torch.float32, device=q.device)
    rows = rows_by_tma(spec, tile, m, Place.of(q), Place.of(out), out.stride(0))
    _launcher(tile, bias is not None)(
        (programs,),
        rows["q"], rows["part_of_q"], scale, weight_by_tma(spec, tile, Place.of(weight)), row, row if bias is None else bias, rows["y"], work, locks,
        m, n, int(row.numel() > 1), steps, alone, share, tile.stripe_m,
    )  # fmt: skip
