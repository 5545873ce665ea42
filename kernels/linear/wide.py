"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] on Hopper, for many rows of x and a W in the `tiles` layout: decoding and multiplying in different warps.

kernel.py decodes what the tensor core reads next in the warps that feed it, so that one waits for the other. Here a program is of two kinds of
warps, which meet in a ring of STAGES buffers, each with 64 columns of BLOCK_N rows of W and of BLOCK_M rows of x:

    decoders    have x copied there by TMA, and decode W's words into 16-bit floats beside it, in the order that the tensor core wants
    consumers   one or two groups of four warps, each with its own BLOCK_N / CONSUMERS rows of W: they multiply out of the ring, y.T = W x.T

`full[s]` completes when a buffer has both, `empty[s]` when all consumers have read it. A program computes blocks of y one after the other, and
decoders run ahead into the next block while consumers store the last: through shared memory, which puts y.T the right way round, by TMA.

What is multiplied and how it is rounded is as product.py has it. A thread's 16 bytes of a tile are what it would hold as the tensor core's
operand, which is also what `stmatrix` takes: four 8 x 8 matrices an instruction go to shared memory, without a bank conflict.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
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

from qplugins.kernels.common.device import add, mul, on_hopper, round_to
from qplugins.kernels.decode.e2m1 import decode_e2m1
from qplugins.kernels.decode.e4m3 import decode_e4m3
from qplugins.kernels.decode.int4 import decode_int4
from qplugins.kernels.decode.int8 import decode_int8
from qplugins.kernels.linear.layout import named
from qplugins.kernels.linear.product import _scale_of, block_at, powers
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import multiprocessors

# as Triton 3.6 calls them, and as later ones do
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # rows of 64 values


@gluon.constexpr_function
def words_layout():
    """Of int16 words [tiles, 1024]: a thread holds 16 consecutive bytes of each tile."""
    return gl.BlockedLayout([1, 8], [1, 32], [1, 4], [1, 0])


@gluon.constexpr_function
def span_layout(rows):
    """Of a span of 16 columns [rows, 16], as `words_layout` and layout.py's order of words within a tile have it."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], *([64 << i, 0] for i in range((rows // 64).bit_length() - 1))],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[rows, 16],
    )


@gluon.jit
def _advance(stage, phase, by: gl.constexpr, STAGES: gl.constexpr):
    stage += by
    if stage >= STAGES:
        stage -= STAGES
        phase ^= 1
    return stage, phase


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _span(
    raw, j: gl.constexpr, scale, zero, CODE: gl.constexpr, SCALE: gl.constexpr, SPAN: gl.constexpr, ZERO: gl.constexpr, UP: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """product._value for codes j [BLOCK_N, 16] of the words, with the scales and zero points of a tile's row in one int32 [BLOCK_N, 1]."""
    at: gl.constexpr = j // SPAN
    layout: gl.constexpr = raw.type.layout
    base: gl.constexpr = 0.0 if CODE != "int4" else 136.0 if dtype == gl.bfloat16 else 1032.0
    if ZERO:
        raw = add(raw, round_to(-(base + (zero >> (16 * at)).to(gl.int16).to(gl.float32)), dtype), dtype, True)
    elif CODE == "int4":
        raw = add(raw, gl.full(raw.shape, -base, dtype, layout), dtype, True)
    if SCALE != "row":
        bits: gl.constexpr = 8 if SCALE == "e4m3" or SCALE == "e8m0" else 32 if SCALE == "f32" else 16
        raw = mul(raw, _scale_of(scale >> (bits * at), SCALE, UP, dtype), dtype, True)
    elif UP != 0:
        raw = mul(raw, gl.full(raw.shape, 2.0**UP, dtype, layout), dtype, True)
    return raw


@gluon.jit
def _load_tile(
    words, scales, zeros, tile, tiles_k, rows,
    SCALE: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, TILES_PER_GROUP: gl.constexpr,
):  # fmt: skip
    """Words int16 [TILES, 1024] of a tile of K, and its scales and zero points, int32 [BLOCK_N]. Tiles past the last read as zeros."""
    w = gl.load(words + tile * 1024, mask=tile < tiles_k, other=0)
    group = (gl.minimum(tile, tiles_k - 1) // TILES_PER_GROUP).to(gl.int64) * rows
    s = 0
    z = 0
    if SCALE != "row":
        s = gl.load(scales + group).to(gl.int32)
    if ZERO:
        if GROUP == 0:
            z = gl.load(zeros).to(gl.int32)
        else:
            z = gl.load(zeros + group).to(gl.int32)
    return w, s, z


@gluon.jit
def _load(
    words, scales, zeros, step, tiles_k, rows, STEP: gl.constexpr,
    SCALE: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, TILES_PER_GROUP: gl.constexpr,
):  # fmt: skip
    """The STEP tiles of 64 columns."""
    first = _load_tile(words, scales, zeros, step * STEP, tiles_k, rows, SCALE, GROUP, ZERO, TILES_PER_GROUP)
    if STEP == 1:
        return first
    else:
        second = _load_tile(words, scales, zeros, step * STEP + 1, tiles_k, rows, SCALE, GROUP, ZERO, TILES_PER_GROUP)
        return first[0], first[1], first[2], second[0], second[1], second[2]


@gluon.jit
def _spans(
    w, s, z, CODE: gl.constexpr, SCALE: gl.constexpr, SPAN: gl.constexpr, ZERO: gl.constexpr, UP: gl.constexpr,
    BLOCK_N: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """What `_load_tile` returned -> the spans of the tile, decoded and scaled, joined: [BLOCK_N, 16, 2] or [BLOCK_N, 16, 2, 2]."""
    # [tiles, w 4, g 8, t 4, h 2, u 2, p 2] -> rows (tile, w, u, g), columns (h, t, p)
    w = w.reshape(BLOCK_N // 64, 4, 8, 4, 2, 2, 2).permute(0, 1, 5, 2, 4, 3, 6).reshape(BLOCK_N, 16)
    w = gl.convert_layout(w, span_layout(BLOCK_N), assert_trivial=True)
    if SCALE != "row":
        s = gl.expand_dims(s, 1)
    if ZERO:
        z = gl.expand_dims(z, 1)
    if CODE == "e2m1" or CODE == "int4":
        if CODE == "e2m1":
            d0, d1, d2, d3 = decode_e2m1(w, dtype, True)
        else:
            d0, d1, d2, d3 = decode_int4(w, dtype, True)
        d0 = _span(d0, 0, s, z, CODE, SCALE, SPAN, ZERO, UP, dtype)
        d1 = _span(d1, 1, s, z, CODE, SCALE, SPAN, ZERO, UP, dtype)
        d2 = _span(d2, 2, s, z, CODE, SCALE, SPAN, ZERO, UP, dtype)
        d3 = _span(d3, 3, s, z, CODE, SCALE, SPAN, ZERO, UP, dtype)
        return gl.join(gl.join(d0, d1), gl.join(d2, d3))
    else:
        if CODE == "e4m3":
            d0, d1 = decode_e4m3(w, dtype, True)
        else:
            d0, d1 = decode_int8(w, dtype, True)
        d0 = _span(d0, 0, s, z, CODE, SCALE, SPAN, ZERO, UP, dtype)
        d1 = _span(d1, 1, s, z, CODE, SCALE, SPAN, ZERO, UP, dtype)
        return gl.join(d0, d1)


@gluon.jit
def _pointer(of, n, BITS: gl.constexpr):
    """To what rows n have in the first of `of`'s groups. of: integers [groups, pairs], each BITS of row n and BITS of row n + 8."""
    dtype: gl.constexpr = gl.int8 if BITS == 8 else gl.int16 if BITS == 16 else gl.int32
    return of.to(gl.pointer_type(dtype), bitcast=True) + (n // 16 * 16 + n % 8 * 2 + n // 8 % 2)


@gluon.jit
def _decoders(
    arguments, which: gl.constexpr, CODE: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, UP: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DECODERS: gl.constexpr,
):  # fmt: skip
    """Fills every DECODERS-th buffer of the ring, from `which` on."""
    x, codes, scale, zero, x_buf, w_buf, full, empty, M, N, tiles_k, rows, steps, stripe_m = arguments
    dtype: gl.constexpr = w_buf.dtype
    SPANS: gl.constexpr = 4 if CODE == "int4" or CODE == "e2m1" else 2  # codes a word
    TILE_K: gl.constexpr = 16 * SPANS
    TILES: gl.constexpr = BLOCK_N // 64
    PER_TILE: gl.constexpr = 1 if GROUP == 0 or GROUP >= TILE_K else TILE_K // GROUP
    SPAN: gl.constexpr = SPANS // PER_TILE
    TILES_PER_GROUP: gl.constexpr = 1 if GROUP <= TILE_K else GROUP // TILE_K
    SCALE_BITS: gl.constexpr = PER_TILE * (8 if SCALE == "e4m3" or SCALE == "e8m0" else 32 if SCALE == "f32" else 16)
    STEP: gl.constexpr = 4 // SPANS  # tiles of K in a buffer
    layout: gl.constexpr = words_layout()

    blocks_m = gl.cdiv(M, BLOCK_M)
    blocks_n = gl.cdiv(N, BLOCK_N)
    stage = which
    phase = 1  # the ring is empty
    first = which  # step in this block
    for block in range(gl.program_id(0), blocks_m * blocks_n, gl.num_programs(0)):
        block_m, block_n = block_at(block, blocks_m, blocks_n, stripe_m)
        # blocks past the matrix's last tile read the last one again; their rows are not stored
        tile_n = gl.minimum(block_n * TILES + gl.arange(0, TILES, gl.SliceLayout(1, layout)), gl.cdiv(N, 64) - 1)
        words = codes + (tile_n.to(gl.int64) * tiles_k * 1024)[:, None] + gl.arange(0, 1024, gl.SliceLayout(0, layout))[None, :]
        n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, span_layout(BLOCK_N)))
        n = gl.where(n < rows, n, 0)
        scales = _pointer(scale, n, SCALE_BITS)
        zeros = _pointer(zero, n, 16 * PER_TILE)

        now = _load(words, scales, zeros, first, tiles_k, rows, STEP, SCALE, GROUP, ZERO, TILES_PER_GROUP)
        soon = _load(words, scales, zeros, first + DECODERS, tiles_k, rows, STEP, SCALE, GROUP, ZERO, TILES_PER_GROUP)
        for step in range(first, steps, DECODERS):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), x.block_type.nbytes)
            tma_load(x, [block_m * BLOCK_M, step * 64], full.index(stage), x_buf.index(stage))
            d = _spans(now[0], now[1], now[2], CODE, SCALE, SPAN, ZERO, UP, BLOCK_N, dtype)
            if STEP == 2:
                d = gl.join(d, _spans(now[3], now[4], now[5], CODE, SCALE, SPAN, ZERO, UP, BLOCK_N, dtype))
            # join appends an axis: [n, c, j & 1, j >> 1]
            w_buf.index(stage).store(d.permute(0, 3, 2, 1).reshape(BLOCK_N, 64))
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = _advance(stage, phase, DECODERS, STAGES)
            # after the fence, which may wait for loads, and two steps ahead
            now = soon
            soon = _load(words, scales, zeros, step + 2 * DECODERS, tiles_k, rows, STEP, SCALE, GROUP, ZERO, TILES_PER_GROUP)
        first = (first + (DECODERS - 1) * steps) % DECODERS


@gluon.jit
def _consumers(
    arguments, which: gl.constexpr, BIAS: gl.constexpr, OUT: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Empties the ring into rows which * BLOCK_N / CONSUMERS .. of each block of W, and stores their columns of y."""
    y, row, bias, x_buf, w_buf, y_buf, full, empty, M, N, steps, stripe_m = arguments
    dtype: gl.constexpr = y.dtype
    ROWS: gl.constexpr = BLOCK_N // CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])

    blocks_m = gl.cdiv(M, BLOCK_M)
    blocks_n = gl.cdiv(N, BLOCK_N)
    mine = y_buf.index(which)
    stage = 0
    phase = 0
    for block in range(gl.program_id(0), blocks_m * blocks_n, gl.num_programs(0)):
        block_m, block_n = block_at(block, blocks_m, blocks_n, stripe_m)
        first = block_n * BLOCK_N + which * ROWS
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        factor = gl.load(row + n, mask=n < N, other=0.0)
        if BIAS:
            offset = gl.load(bias + n, mask=n < N, other=0.0)

        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, layout)
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            w = w_buf.index(stage).slice(which * ROWS, ROWS)
            acc = warpgroup_mma(w, x_buf.index(stage).permute([1, 0]), acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1, pred=step > 0)  # the product before this one is done
            stage, phase = _advance(stage, phase, 1, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1)

        acc = acc * OUT * factor[:, None]  # in this order: a row's factor may be near float32's end
        if BIAS:
            acc += offset.to(gl.float32)[:, None]
        tma.store_wait(0)
        tl.debug_barrier()  # the thread that stored the last block knows that it has been read
        mine.permute([1, 0]).store(acc.to(dtype))
        fence_async_shared()
        tma_store(y, [block_m * BLOCK_M, first], mine)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "tiles_k", "rows", "steps", "stripe_m"])
def wide_kernel(
    x, codes, row, scale, zero, bias, y, M, N, tiles_k, rows, steps, stripe_m,
    CODE: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr, UP: gl.constexpr, OUT: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, DECODERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, DECODER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n]. A program owns blocks program_id, + num_programs, ... of BLOCK_N columns and BLOCK_M rows of y.

    x      TMA descriptor of [M, K], blocks of [BLOCK_M, 64]         y  of [M, N], blocks of [BLOCK_M, BLOCK_N / CONSUMERS]
    codes  int16 [tiles_n, tiles_k, 1024]        scale, zero  integers [groups, rows / 2]        row  float32 [N]        bias  [N]
    steps  buffers of 64 columns that cover K
    """
    dtype: gl.constexpr = x.dtype
    x_buf = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 64], x.layout)
    w_buf = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 64], x.layout)
    y_buf = gl.allocate_shared_memory(dtype, [CONSUMERS, BLOCK_M, BLOCK_N // CONSUMERS], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # x is to come, and W is there
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()

    decode = (x, codes, scale, zero, x_buf, w_buf, full, empty, M, N, tiles_k, rows, steps, stripe_m)
    consume = (y, row, bias, x_buf, w_buf, y_buf, full, empty, M, N, steps, stripe_m)
    gl.warp_specialize(
        [
            (_consumers, (consume, 1, BIAS, OUT, BLOCK_N, BLOCK_M, STAGES, CONSUMERS)),
            (_consumers, (consume, 0, BIAS, OUT, BLOCK_N, BLOCK_M, STAGES, CONSUMERS)),
            (_decoders, (decode, 0, CODE, SCALE, GROUP, ZERO, UP, BLOCK_N, BLOCK_M, STAGES, DECODERS)),
            (_decoders, (decode, 1, CODE, SCALE, GROUP, ZERO, UP, BLOCK_N, BLOCK_M, STAGES, DECODERS)),
        ][2 - CONSUMERS : 2 + DECODERS],
        [4] * (CONSUMERS - 1 + DECODERS),
        [CONSUMER_REGISTERS] * (CONSUMERS - 1) + [DECODER_REGISTERS] * DECODERS,
    )


@dataclass(frozen=True)
class WideTile:
    """block_n, block_m   rows of W, a multiple of 64 * consumers, and of x: a block of y
    stages   buffers of the ring
    consumers, decoders   groups of four warps, 1 or 2 of either
    programs    that a multiprocessor holds at the same time
    stripe_m    blocks of x that are done before the next ones
    """

    block_n: int
    block_m: int
    stages: int
    consumers: int = 2
    decoders: int = 1
    programs: int = 1
    stripe_m: int = 8


# with the time that a multiply-add takes, to that of the first
TILES = (
    (WideTile(128, 256, 3), 1.0),
    (WideTile(128, 128, 5, decoders=2), 1.08),
    (WideTile(64, 128, 4, consumers=1, programs=2), 1.25),
)


def registers(tile: WideTile) -> tuple[int, int, int]:
    """Of a thread: at the launch, of a consumer, of a decoder. A consumer has its sums and what it needs besides, decoders have the rest."""
    groups = tile.consumers + tile.decoders
    launch = min(168, 65536 // (128 * groups * tile.programs) // 8 * 8)
    consumer = tile.block_n // tile.consumers * tile.block_m // 128 + 56
    return launch, consumer, min(160, (launch * groups - consumer * tile.consumers) // tile.decoders // 8 * 8)


def constants(spec: Spec, dtype: torch.dtype, tile: WideTile) -> dict:
    """What the kernel is compiled for. dtype: of x."""
    up, down = powers(spec, dtype)
    launch, consumer, decoder = registers(tile)
    return {
        "CODE": spec.code,
        "SCALE": spec.scale if spec.group else "row",
        "GROUP": spec.group or 0,
        "ZERO": spec.zero_point,
        "UP": up,
        "OUT": 2.0**down,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "STAGES": tile.stages,
        "CONSUMERS": tile.consumers,
        "DECODERS": tile.decoders,
        "CONSUMER_REGISTERS": consumer,
        "DECODER_REGISTERS": decoder,
        "num_warps": 4,  # a group of consumers
        "maxnreg": launch,
    }


@lru_cache(maxsize=8192)
def choose(m: int, n: int, device: torch.device) -> WideTile:
    """The tile with which the busiest multiprocessor is done first."""
    sms = multiprocessors(device)

    def cost(tile: WideTile, rate: float) -> float:
        blocks = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
        return triton.cdiv(blocks, sms) * tile.block_m * tile.block_n * rate

    return min(TILES, key=lambda entry: cost(*entry))[0]


def refuses(spec: Spec, x: Tensor, out: Tensor) -> str | None:
    """Why `linear` cannot compute out from x, as a sentence; None where it can."""
    if not on_hopper():
        return "the wide kernel is made for Hopper"
    if spec.code is None:
        return "the matrix is not quantized"
    for name, t in (("x", x), ("out", out)):
        if t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16:
            return f"TMA wants rows of {name} that begin at multiples of 16 bytes; they are {t.stride(0)} columns apart, from {t.data_ptr():#x}"
    return None


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None, tile: WideTile | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias. x and out are bfloat16 or float16, and `refuses` has nothing against them; M > 0.

    tile  None: by the sizes
    """
    t = named("triton", spec, tensors)
    m = x.shape[0]
    tile = tile or choose(m, spec.n, x.device)
    scale, zero = t.get("scale"), t.get("zero")
    grouped = scale if scale is not None else zero
    blocks = triton.cdiv(m, tile.block_m) * triton.cdiv(spec.n, tile.block_n)
    wide_kernel[(min(blocks, multiprocessors(x.device) * tile.programs),)](
        TensorDescriptor(x, [m, spec.k], [x.stride(0), 1], [tile.block_m, 64], SWIZZLED),
        t["codes"], t["row"], t["row"] if scale is None else scale, t["row"] if zero is None else zero, t["row"] if bias is None else bias,
        TensorDescriptor(out, [m, spec.n], [out.stride(0), 1], [tile.block_m, tile.block_n // tile.consumers], SWIZZLED),
        m, spec.n, t["codes"].shape[1], 0 if grouped is None else 2 * grouped.shape[1], triton.cdiv(spec.k, 64), tile.stripe_m,
        **constants(spec, x.dtype, tile), BIAS=bias is not None,
    )  # fmt: skip
