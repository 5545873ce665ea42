"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] on Hopper, for many rows of x and a W in the `tiles` layout: decoding while the tensor core multiplies.

kernel.py decodes, multiplies and waits in turn. Here the tensor core is always at a product, while warps decode what it needs next. They meet in
a ring of STAGES buffers, each with 64 columns of BLOCK_M rows of x and of BLOCK_N rows of W, which are still packed, and of W's scales:

    the loader   one warp has TMA fill the ring, as far ahead as there are buffers. `full[s]` completes when buffer s has come
    consumers    eight warps decode W into registers and multiply, y.T = W x.T, with x from the buffer. `empty[s]` completes when they are done with it

Four spans of 16 columns take turns as the tensor core's first operand, each in registers of its own. Consumers decode one, start its product, and
go on to the next when the product that had the next one's registers before is done: so three are under way while they decode. That compilers leave
those registers alone so long is not a matter of course: tests/kernels/sass.py looks.

A program computes blocks of y one after the other, and the ring runs ahead into the next while one is stored: through shared memory, which puts
y.T the right way round, by TMA. Where the last blocks are fewer than programs, programs may share them: they are one row of steps, of which each
program does the same number. So each has parts of at most two blocks, whose sums it leaves in `work`, and the last to come adds them up.

What is multiplied and how it is rounded is as product.py has it. Columns past K are multiplied too: TMA reads x as zeros there, and what stands
for W, though it may be another row's, is finite.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import inf
from typing import NamedTuple

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

from qplugins.kernels.common.device import add, fma, mul, on_hopper, round_to
from qplugins.kernels.common.launch import Launcher, Place
from qplugins.kernels.decode.e2m1 import decode_e2m1
from qplugins.kernels.decode.e4m3 import decode_e4m3
from qplugins.kernels.decode.int4 import decode_int4
from qplugins.kernels.decode.int8 import decode_int8
from qplugins.kernels.linear.layout import INTEGERS, LOCKS, named, scale_word_bits, tile_k
from qplugins.kernels.linear.product import _scale_of, block_at, powers
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import cdiv, multiprocessors

# as Triton 3.6 calls them, and as later ones do
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # rows of 64 values: x, y and words


def group_layout(bits: int) -> gl.NVMMASharedLayout:
    """Of what groups have, integers of so many bits: rows of 16 bytes, which lie as they do in memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)


@gluon.constexpr_function
def words_layout(warps):
    """Of int16 words [16 * tiles, 64], a tile 16 rows: a thread holds 16 consecutive bytes of each tile of its group of four warps."""
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def span_layout(rows, warps):
    """Of a span of 16 columns [rows, 16], as `words_layout` and layout.py's order of words within a tile have it."""
    tiles = [[64 << i, 0] for i in range((rows // 64).bit_length() - 1)]
    groups = (warps // 4).bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], *tiles[groups:]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], *tiles[:groups]],
        block_bases=[],
        shape=[rows, 16],
    )


@gluon.constexpr_function
def pairs_layout(rows, width, warps):
    """Of what groups have for so many rows of W, `width` of them a row of 16 bytes: in order (tile, w, g, u), to the threads of `span_layout`."""
    bases = [[0, 1 << i] if 1 << i < width else [(1 << i) // width, 0] for i in range(rows.bit_length() - 1)]
    groups = (warps // 4).bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[bases[0], *bases[6 + groups :]],
        lane_bases=[[0, 0], [0, 0], *bases[1:4]],
        warp_bases=bases[4 : 6 + groups],
        block_bases=[],
        shape=[rows // width, width],
    )


@gluon.constexpr_function
def acc_layout(columns, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def lines_layout(rows, columns, warps):
    """Of a sum as it is left in memory, [rows * columns / 128, 128]: a line is what a warp holds, as `acc_layout` has it, in four registers."""
    of_columns = [[1 << i, 0] for i in range((columns // 16).bit_length() - 1)]
    of_rows = [[columns // 16 << i, 0] for i in range((rows // 8).bit_length() - 1)]
    groups = (warps // 4).bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], *of_columns, of_rows[0], *of_rows[3 + groups :]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        warp_bases=of_rows[1 : 3 + groups],
        block_bases=[],
        shape=[rows * columns // 128, 128],
    )


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _scale_twice(word, SCALE: gl.constexpr, UP: gl.constexpr, dtype: gl.constexpr):
    """product._scale_of in both halves of an int32."""
    # the byte and the exponent's offset are put in both halves by one multiplication and one addition
    bf16: gl.constexpr = dtype == gl.bfloat16
    if SCALE == "e4m3":
        shift: gl.constexpr = 4 if bf16 else 7
        offset: gl.constexpr = (UP + 117) << 7 if bf16 else (UP + 5) << 10
        return (word & 0xFF) * (0x10001 << shift) + offset * 0x10001
    elif SCALE == "e8m0" and bf16:
        return (word & 0xFF) * (0x10001 << 7) + (UP << 7) * 0x10001
    else:
        return (_scale_of(word, SCALE, UP, dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001


@gluon.jit
def _mul_twice(raw, scale, dtype: gl.constexpr):
    """product's `mul` for a scale in both halves of an int32, which is the same for two neighbours of raw."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 nil; mov.b32 nil, 0x80008000; fma.rn.bf16x2 $0, $1, $2, nil; }",
            "=r,r,r,r", [raw, scale], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r,r", [raw, scale], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _eight_below(scale, ODD: gl.constexpr):
    """-8 of the units that int4 has, bfloat16 in both halves of an int32, times a scale there: exactly."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 eight, nil; mov.b32 eight, 0x80808080; mov.b32 nil, 0x80008000; fma.rn.bf16x2 $0, $1, eight, nil; }"
        if ODD
        else "{ .reg .b32 eight, nil; mov.b32 eight, 0x80088008; mov.b32 nil, 0x80008000; fma.rn.bf16x2 $0, $1, eight, nil; }",
        "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _fma_twice(raw, scale, offset):
    """raw * scale + offset, bfloat16, with the latter two in both halves of an int32."""
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $4;", "=r,r,r,r,r,r", [raw, scale, offset], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _span(
    raw, j: gl.constexpr, scale, zero, CODE: gl.constexpr, SCALE: gl.constexpr, SPAN: gl.constexpr, ZERO: gl.constexpr, UP: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """product._value for codes j [BLOCK_N, 16] of the words, with the scales and zero points of a tile's row in one int32 [ROWS, 1]."""
    at: gl.constexpr = j // SPAN
    layout: gl.constexpr = raw.type.layout
    INT4: gl.constexpr = CODE == "int4"
    TINY: gl.constexpr = INT4 and dtype == gl.bfloat16
    unit: gl.constexpr = (2.0**-129 if j % 2 else 2.0**-133) if TINY else 1.0
    up: gl.constexpr = UP - 4 * (j % 2) if TINY else UP
    base: gl.constexpr = 8.0 if TINY else 1032.0 if INT4 else 0.0
    OFFSET: gl.constexpr = TINY and not ZERO
    if ZERO:
        raw = add(raw, round_to(-(base + (zero >> (16 * at)).to(gl.int16).to(gl.float32)) * unit, dtype), dtype, True)
    elif INT4 and not TINY:
        raw = add(raw, gl.full(raw.shape, -base, dtype, layout), dtype, True)
    if SCALE != "row":
        bits: gl.constexpr = 8 if SCALE == "e4m3" or SCALE == "e8m0" else 32 if SCALE == "f32" else 16
        twice = _scale_twice(scale >> (bits * at), SCALE, up, dtype)
        if OFFSET:
            raw = _fma_twice(raw, twice, _eight_below(twice, j % 2))
        else:
            raw = _mul_twice(raw, twice, dtype)
    elif OFFSET:
        raw = fma(raw, gl.full(raw.shape, 2.0**up, dtype, layout), gl.full(raw.shape, -base * unit * 2.0**up, dtype, layout), dtype, True)
    else:
        # also by 1: ptxas of CUDA 12.8 has what decodes int8 overwrite registers of products under way (tests/kernels/sass.py tells)
        raw = mul(raw, gl.full(raw.shape, 2.0**up, dtype, layout), dtype, True)
    return raw


@gluon.jit
def _of_rows(buf, sub: gl.constexpr, BLOCK_N: gl.constexpr):
    """What the buffer of groups has for the rows of W, int32 [BLOCK_N, 1]."""
    width: gl.constexpr = 128 // buf.dtype.primitive_bitwidth
    warps: gl.constexpr = gl.num_warps()
    part = buf.slice(sub * BLOCK_N // width, BLOCK_N // width).load(pairs_layout(BLOCK_N, width, warps))
    of = part.to(gl.int32).reshape(BLOCK_N // 64, 4, 8, 2).permute(0, 1, 3, 2).reshape(BLOCK_N)
    return gl.expand_dims(gl.convert_layout(of, gl.SliceLayout(1, span_layout(BLOCK_N, warps)), assert_trivial=True), 1)


@gluon.jit
def _spans(words, CODE: gl.constexpr, BLOCK_N: gl.constexpr, dtype: gl.constexpr):
    """int16 [16 * tiles, 64] -> decoded, a span of 16 columns each, [BLOCK_N, 16]: 4 for 4-bit codes, 2 for 8-bit ones."""
    # [tiles, w 4, g 8, t 4, h 2, u 2, p 2] -> rows (tile, w, u, g), columns (h, t, p)
    w = words.reshape(BLOCK_N // 64, 4, 8, 4, 2, 2, 2).permute(0, 1, 5, 2, 4, 3, 6).reshape(BLOCK_N, 16)
    w = gl.convert_layout(w, span_layout(BLOCK_N, gl.num_warps()), assert_trivial=True)
    if CODE == "e2m1":
        return decode_e2m1(w, dtype, True)
    elif CODE == "int4":
        return decode_int4(w, dtype, True)
    elif CODE == "e4m3":
        return decode_e4m3(w, dtype, True)
    else:
        return decode_int8(w, dtype, True)


@gluon.jit
def _load_zero(zero, n, rows):
    """The zero points of rows of W that have one each: int32. zero: integers, 16 bits of row n and 16 bits of row n + 8."""
    at = zero.to(gl.pointer_type(gl.int16), bitcast=True) + (n // 16 * 16 + n % 8 * 2 + n // 8 % 2)
    return gl.load(at, mask=n < rows, other=0).to(gl.int32)


@gluon.jit
def _load_groups(of, buf, bar, sub: gl.constexpr, first, BLOCK_N: gl.constexpr):
    """What a group has for BLOCK_N rows of W from `first` on, which counts all groups' rows."""
    width: gl.constexpr = of.block_shape[1]
    tma_load(of, [first // width, 0], bar, buf.slice(sub * BLOCK_N // width, BLOCK_N // width))


# TMA takes longer for rows past x's last one than for those that there are. A block of y that reaches past it gets its rows of x in boxes of fewer,
# without those that have none of x: what is in their place ends in rows of y that are not stored.


@gluon.jit
def boxes_there(part, first, M, BLOCK_M: gl.constexpr):
    """How many of BLOCK_M rows' boxes, of the size that the descriptor `part` has, have some of x [M, K] from row `first` on."""
    return gl.minimum(gl.cdiv(M - first, part.block_shape[0]), BLOCK_M // part.block_shape[0])


@gluon.jit
def expect_rows(x, part, bar, there, BLOCK_M: gl.constexpr, NBYTES: gl.constexpr, pred=True):
    """bar: will have got NBYTES, and so many boxes."""
    BOXES: gl.constexpr = BLOCK_M // part.block_shape[0]
    if there == BOXES:
        mbarrier.expect(bar, NBYTES + x.block_type.nbytes, pred=pred)
    else:
        for i in gl.static_range(1, BOXES):
            mbarrier.expect(bar, NBYTES + i * part.block_type.nbytes, pred=(there == i) & pred)


@gluon.jit
def load_rows(x, part, first, column, bar, buf, there, BLOCK_M: gl.constexpr):
    """x, part: descriptors of the same, with boxes of BLOCK_M rows, or some of them."""
    ROWS: gl.constexpr = part.block_shape[0]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    if there == BOXES:
        tma_load(x, [first, column], bar, buf)
    else:
        for i in gl.static_range(BOXES - 1):
            tma_load(part, [first + i * ROWS, column], bar, buf.slice(i * ROWS, ROWS), pred=i < there)


@triton.jit
def piece_of_work(i, program, programs, blocks, steps, alone, share):
    """(block of y, first step, steps) of a program's piece of work i: the blocks that it computes alone, and then two parts of shared ones, of
    which one or both may have no steps."""
    part = i - tl.cdiv(alone - program, programs)
    # the shared blocks' steps in one row: a program's share begins in one block, and may end in the next
    begin = program * share
    block = begin // steps + part
    first = tl.maximum(begin, block * steps)
    last = tl.minimum(tl.minimum(begin + share, (blocks - alone) * steps), (block + 1) * steps)
    if part < 0:
        return program + i * programs, 0, steps
    else:
        # a part without steps may be of a block that there is not
        return tl.minimum(alone + block, blocks - 1), first - block * steps, tl.maximum(last - first, 0)


@triton.jit
def own_piece(i, blocks_m, blocks_n, steps, alone, share, stripe_m):
    """`piece_of_work` of this program, as (block of y, which one of x's rows, which one of W's, first step, steps)."""
    block, first, count = piece_of_work(i, tl.program_id(0), tl.num_programs(0), blocks_m * blocks_n, steps, alone, share)
    block_m, block_n = block_at(block, blocks_m, blocks_n, stripe_m)
    return block, block_m, block_n, first, count


@triton.jit
def parts_of_block(block, steps, share):
    """(first program, and one past the last) that have part of a shared block; shared ones are counted from 0."""
    return block * steps // share, tl.cdiv((block + 1) * steps, share)


@triton.jit
def slot_of_part(program, block, steps, share):
    """Where a program leaves its part of a shared block: it has at most two."""
    return 2 * program + block - program * share // steps


@gluon.jit
def _loader(
    sources, sizes, buffers, GROUP: gl.constexpr, SCALED: gl.constexpr, ZEROED: gl.constexpr, SUB: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SHARED_K: gl.constexpr,
):  # fmt: skip
    """Fills the ring for all of a program's blocks."""
    x, part, M, codes, scale, zero = sources
    blocks_m, blocks_n, tiles_n, tiles_k, rows, steps, alone, share, stripe_m = sizes
    x_buf, w_buf, s_buf, z_buf, full, empty = buffers
    TILES: gl.constexpr = BLOCK_N // 64
    PER_GROUP: gl.constexpr = 1 if GROUP <= 64 // SUB else GROUP * SUB // 64  # tiles of K
    SCALES: gl.constexpr = SUB * scale.block_type.nbytes if SCALED else 0
    ZEROS: gl.constexpr = SUB * zero.block_type.nbytes if ZEROED else 0

    tl.extra.cuda.gdc_wait()  # for x
    stage = 0
    phase = 1  # the ring is empty
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    for piece in range(gl.cdiv(alone - program, programs) + 2 * SHARED_K):
        block, block_m, block_n, first, count = own_piece(piece, blocks_m, blocks_n, steps, alone, share, stripe_m)
        there = boxes_there(part, block_m * BLOCK_M, M, BLOCK_M)
        for step in range(first, first + count):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            expect_rows(x, part, bar, there, BLOCK_M, SUB * TILES * codes.block_type.nbytes + SCALES + ZEROS)
            load_rows(x, part, block_m * BLOCK_M, step * 64, bar, x_buf.index(stage), there, BLOCK_M)
            for sub in gl.static_range(SUB):
                for i in gl.static_range(TILES):
                    # blocks past the matrix's last tile read the last one again; their rows are not stored
                    tile = gl.minimum(block_n * TILES + i, tiles_n - 1) * tiles_k + step * SUB + sub
                    tma_load(codes, [tile * 16, 0], bar, w_buf.index(stage).slice((sub * TILES + i) * 16, 16))
                group = gl.minimum(step * SUB + sub, tiles_k - 1) // PER_GROUP
                if SCALED:
                    _load_groups(scale, s_buf.index(stage), bar, sub, group * rows + block_n * BLOCK_N, BLOCK_N)
                if ZEROED:
                    _load_groups(zero, z_buf.index(stage), bar, sub, group * rows + block_n * BLOCK_N, BLOCK_N)
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _join_parts(acc, work, locks, block, steps, alone, share, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """(sum of a shared block, whether all parts were there). Leaves a part's sum; the last program to do so adds up those of the block."""
    block -= alone
    # rows (.., g 8), columns (.., j 2, t 4, p 2)
    lines = acc.reshape(BLOCK_N // 8, 8, BLOCK_M // 16, 2, 4, 2).permute(0, 2, 1, 4, 3, 5).reshape(BLOCK_N * BLOCK_M // 128, 128)
    layout: gl.constexpr = lines_layout(BLOCK_N, BLOCK_M, gl.num_warps())
    lines = gl.convert_layout(lines, layout, assert_trivial=True)
    line = gl.arange(0, BLOCK_N * BLOCK_M // 128, gl.SliceLayout(1, layout))[:, None] * 128
    sums = work + (line + gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :])
    slot = slot_of_part(gl.program_id(0), block, steps, share).to(gl.int64)
    gl.store(sums + slot * (BLOCK_N * BLOCK_M), lines)
    tl.debug_barrier()  # all of the program's threads have stored before one of them says so
    begin, end = parts_of_block(block, steps, share)
    there = gl.atomic_add(locks + block, 1, sem="acq_rel") == end - begin - 1
    if there:
        # in the order of K, so that the result does not depend on who was last
        slot = slot_of_part(begin, block, steps, share).to(gl.int64)
        lines = gl.load(sums + slot * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        for program in range(begin + 1, end):
            slot = slot_of_part(program, block, steps, share).to(gl.int64)
            lines += gl.load(sums + slot * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        gl.store(locks + block, 0)
    whole = lines.reshape(BLOCK_N // 8, BLOCK_M // 16, 8, 4, 2, 2).permute(0, 2, 1, 4, 3, 5).reshape(BLOCK_N, BLOCK_M)
    return gl.convert_layout(whole, acc.type.layout, assert_trivial=True), there


@gluon.jit
def _store(
    acc, factor, offset, y, y_buf, block_m, block_n, OUT: gl.constexpr, BIAS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """A block's sum becomes a block of y."""
    acc = acc * OUT * factor[:, None]  # in this order: a row's factor may be near float32's end
    if BIAS:
        acc += offset.to(gl.float32)[:, None]
    tma.store_wait(0)
    tl.debug_barrier()  # the thread that stored the last block knows that it has been read
    y_buf.permute([1, 0]).store(acc.to(y.dtype))
    fence_async_shared()
    tma_store(y, [block_m * BLOCK_M, block_n * BLOCK_N], y_buf)


@gluon.jit
def _consumers(
    result, zero, sizes, buffers, CODE: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
    UP: gl.constexpr, OUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SHARED_K: gl.constexpr,
):  # fmt: skip
    """Empty the ring into blocks of y."""
    y, row, bias, work, locks, N, y_buf = result
    blocks_m, blocks_n, tiles_n, tiles_k, rows, steps, alone, share, stripe_m = sizes
    x_buf, w_buf, s_buf, z_buf, full, empty = buffers
    layout: gl.constexpr = acc_layout(BLOCK_M, gl.num_warps())
    dtype: gl.constexpr = x_buf.dtype
    SPANS: gl.constexpr = 4 if CODE == "int4" or CODE == "e2m1" else 2  # codes a word
    PER_TILE: gl.constexpr = 1 if GROUP == 0 or GROUP >= 16 * SPANS else 16 * SPANS // GROUP
    SPAN: gl.constexpr = SPANS // PER_TILE
    SUB: gl.constexpr = 4 // SPANS  # tiles of K
    TILES: gl.constexpr = BLOCK_N // 64

    tl.extra.cuda.gdc_wait()  # before anything is written
    stage = 0
    phase = 0
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    for piece in range(gl.cdiv(alone - program, programs) + 2 * SHARED_K):
        block, block_m, block_n, first, count = own_piece(piece, blocks_m, blocks_n, steps, alone, share, stripe_m)
        # what storing takes, before it is waited for
        n = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        factor = gl.load(row + n, mask=n < N, other=0.0)
        offset = 0.0
        if BIAS:
            offset = gl.load(bias + n, mask=n < N, other=0.0)
        row_zero = 0
        if ZERO and GROUP == 0:
            at = block_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, span_layout(BLOCK_N, gl.num_warps())))
            row_zero = gl.expand_dims(_load_zero(zero, at, rows), 1)

        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
        for step in range(count):
            mbarrier.wait(full.index(stage), phase)
            for sub in gl.static_range(SUB):
                scales = 0
                zeros = row_zero
                if SCALE != "row":
                    scales = _of_rows(s_buf.index(stage), sub, BLOCK_N)
                if ZERO and GROUP != 0:
                    zeros = _of_rows(z_buf.index(stage), sub, BLOCK_N)
                words = w_buf.index(stage).slice(sub * TILES * 16, TILES * 16).load(words_layout(gl.num_warps()))
                spans = _spans(words, CODE, BLOCK_N, dtype)
                for j in gl.static_range(SPANS):
                    w = _span(spans[j], j, scales, zeros, CODE, SCALE, SPAN, ZERO, UP, dtype)
                    w = gl.convert_layout(w, gl.DotOperandLayout(0, layout, 2), assert_trivial=True)
                    xt = x_buf.index(stage).permute([1, 0]).slice(16 * (sub * SPANS + j), 16)
                    acc = warpgroup_mma(w, xt, acc, is_async=True)
                    acc = warpgroup_mma_wait(3, deps=(acc,))
            mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1, pred=step > 0)  # all that read the buffer before this one is done
            stage, phase = _advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1, pred=count > 0)

        whole = count == steps
        if SHARED_K:
            if (count > 0) & (count < steps):
                acc, whole = _join_parts(acc, work, locks, block, steps, alone, share, BLOCK_N, BLOCK_M)
            if whole:
                _store(acc, factor, offset, y, y_buf, block_m, block_n, OUT, BIAS, BLOCK_N, BLOCK_M)
        else:
            _store(acc, factor, offset, y, y_buf, block_m, block_n, OUT, BIAS, BLOCK_N, BLOCK_M)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "tiles_n", "tiles_k", "rows", "steps", "alone", "share", "stripe_m"])
def wide_kernel(
    x, part, codes, row, scale, zero, bias, y, work, locks, M, N, tiles_n, tiles_k, rows, steps, alone, share, stripe_m,
    CODE: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr, UP: gl.constexpr, OUT: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SHARED_K: gl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n]. A program computes blocks program_id, + num_programs, ... of BLOCK_N columns and BLOCK_M rows of y.
    That is for the first `alone` blocks; of the others, fewer than there are programs, each program does `share` of their steps.

    TMA descriptors, with the blocks that are read or written at a time:
    x, part      [M, K], both x, [BLOCK_M, 64] and fewer rows        y  [M, N], [BLOCK_M, BLOCK_N]
    codes        int16 [tiles_n * tiles_k * 16, 64], a tile
    scale, zero  integers, 16 bytes a row, what one group of columns has for BLOCK_N rows of W

    row  float32 [N]        bias  [N]        work  float32 [2 * num_programs, BLOCK_N, BLOCK_M]
    locks  int32 [shared blocks], zeros        rows  of W in whole tiles        steps  of 64 columns, that cover K
    """
    dtype: gl.constexpr = x.dtype
    SUB: gl.constexpr = 1 if CODE == "int4" or CODE == "e2m1" else 2  # tiles side by side in 64 columns
    SCALED: gl.constexpr = SCALE != "row"
    ZEROED: gl.constexpr = ZERO and GROUP != 0
    x_buf = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 64], x.layout)
    w_buf = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N // 4 * SUB, 64], codes.layout)
    s_buf = w_buf
    z_buf = w_buf  # where there is none, nobody looks
    if SCALED:
        s_buf = gl.allocate_shared_memory(scale.dtype, [STAGES, SUB * scale.block_shape[0], scale.block_shape[1]], scale.layout)
    if ZEROED:
        z_buf = gl.allocate_shared_memory(zero.dtype, [STAGES, SUB * zero.block_shape[0], zero.block_shape[1]], zero.layout)
    y_buf = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    # the next kernel's programs come up as these end: no multiprocessor has registers for two, so none gets more of them than others
    tl.extra.cuda.gdc_launch_dependents()

    buffers = (x_buf, w_buf, s_buf, z_buf, full, empty)
    sources = (x, part, M, codes, scale, zero)
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), tiles_n, tiles_k, rows, steps, alone, share, stripe_m)
    result = (y, row, bias, work, locks, N, y_buf)
    gl.warp_specialize(
        [
            (_consumers, (result, zero, sizes, buffers, CODE, SCALE, GROUP, ZERO, BIAS, UP, OUT, BLOCK_N, BLOCK_M, STAGES, SHARED_K)),
            (_loader, (sources, sizes, buffers, GROUP, SCALED, ZEROED, SUB, BLOCK_N, BLOCK_M, STAGES, SHARED_K)),
        ],
        [1],
        [24],
    )


@dataclass(frozen=True)
class WideTile:
    """block_n, block_m   rows of W, a multiple of 64 for each four of WARPS, and of x: a block of y
    shared      whether programs share the K of the last blocks, where there are not as many of them as programs
    stripe_m    blocks of x that are done before the next ones
    """

    block_n: int
    block_m: int
    shared: bool = False
    stripe_m: int = 8

    def __str__(self) -> str:
        return f"{self.block_n}x{self.block_m}{' shared' * self.shared}"


# with the cycles that 64 columns of K take; the tensor core alone would take 128 for each 128 x 32 of a block. bench/wide_tiles.py
# fitted these, BLOCK and SUM to times on an H100
TILES = (
    (WideTile(256, 32), 731),
    (WideTile(128, 64), 520),
    (WideTile(256, 64), 843),
    (WideTile(128, 128), 667),
    (WideTile(256, 128), 1202),
    (WideTile(128, 256), 1117),
)
BLOCK = 4260  # cycles that a block, or a part of one, takes besides: until the ring has something, and until it is stored
PART = 8  # steps that take about as long as another part of a block takes besides
SUM = 27  # bytes of sums that are left or added up in a cycle
MEMORY = 13  # bytes in a cycle, of a multiprocessor's share of the memory's bandwidth
CACHE = 30e6  # bytes of x that stay in the L2 cache beside what else goes through it
# bits of a code -> (rows, weights, columns): from so many rows on, this is quicker than kernel.py for a matrix of so many weights and columns. Fewer rows
# were not timed with 8 bits
LEAST = {4: ((17, 50_000_000, 8192), (33, 0, 0)), 8: ((256, 0, 0),)}
ROWS = 64  # of x, at most, that are a part of a block's
WARPS = 8  # that decode and multiply
SHARED_MEMORY = 227 << 10  # that one program may have


@cache
def blocks_of(spec: Spec, tile: WideTile) -> dict[str, tuple[list[int], gl.NVMMASharedLayout]]:
    """What TMA reads and writes at a time, and how it lies in shared memory: argument -> (block, layout)."""
    found = {
        "x": ([tile.block_m, 64], SWIZZLED),
        "part": ([min(ROWS, tile.block_m), 64], SWIZZLED),
        "codes": ([16, 64], SWIZZLED),
        "y": ([tile.block_m, tile.block_n], SWIZZLED),
    }
    if spec.group is not None:
        for name in ("scale", "zero") if spec.zero_point else ("scale",):
            bits = scale_word_bits(spec, name == "zero") // 2  # of a row of W in a tile
            found[name] = [tile.block_n * bits // 128, 128 // bits], group_layout(bits)
    return found


def stages(spec: Spec, tile: WideTile) -> int:
    """Buffers of the ring: as many as there is room for."""
    nbytes = {name: block[0] * block[1] * layout.element_bitwidth // 8 for name, (block, layout) in blocks_of(spec, tile).items()}
    tiles = 64 // tile_k(spec)  # side by side
    buffer = nbytes["x"] + tiles * (tile.block_n // 64 * nbytes["codes"] + nbytes.get("scale", 0) + nbytes.get("zero", 0))
    # buffers begin at multiples of 1 KiB
    return min(8, (SHARED_MEMORY - 1024 - nbytes["y"]) // (buffer + 16))


def constants(spec: Spec, dtype: torch.dtype, tile: WideTile) -> dict:
    """What the kernel is compiled for. dtype: of x."""
    up, down = powers(spec, dtype)
    return {
        "CODE": spec.code,
        "SCALE": spec.scale if spec.group else "row",
        "GROUP": spec.group or 0,
        "ZERO": spec.zero_point,
        "UP": up,
        "OUT": 2.0**down,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "STAGES": stages(spec, tile),
        "SHARED_K": tile.shared,
        "num_warps": WARPS,
        # the loader comes with four warps' registers, and gives most of them to the others
        "maxnreg": 65536 // (32 * (WARPS + 4)) // 8 * 8,
    }


def share_out(blocks: int, steps: int, programs: int) -> tuple[int, int]:
    """(blocks that programs compute alone, each as many, and the steps of what is left that each program does)."""
    left = blocks % programs
    if left == 0:
        return blocks, 1
    even = cdiv(left * steps, programs)
    # with as many programs for each block none has parts of two
    whole = cdiv(steps, programs // left)
    return blocks - left, whole if whole <= max(even + PART, 1.1 * even) else even


def again(tile: WideTile, m: int, k: int, left: int) -> float:
    """Bytes of x [m, k] that programs read from the memory which share K of so many blocks. They are at different columns, so that each reads its own
    where x does not stay in the L2 cache."""
    row = 2 * k
    return left * tile.block_m * row if min(m, tile.stripe_m * tile.block_m) * row > CACHE else 0


def busiest(tile: WideTile, blocks: int, steps: int, sms: int, block: float, sums: float) -> tuple[float, float]:
    """(steps, cycles besides) of the multiprocessor that has most to do of so many blocks of y; infinite where there are none to share.

    block, sums  cycles of a block or a part of one besides its steps, and bytes of sums in a cycle
    """
    if not tile.shared:
        rounds = cdiv(blocks, sms)
        return rounds * steps, rounds * block
    alone, share = share_out(blocks, steps, sms)
    if blocks == alone:
        return inf, inf
    # a program leaves the sums of its parts, and the last one of a block adds up those of all parts
    parts = 1 if steps % share == 0 else 2
    moved = (parts + steps / share + parts - 1) * 4 * tile.block_m * tile.block_n
    return alone // sms * steps + share, (alone // sms + parts) * block + moved / sums


def cycles(tile: WideTile, step: float, m: int, n: int, k: int, sms: int, block: float = BLOCK, sums: float = SUM) -> float:
    """What the busiest multiprocessor takes for m rows of x and W[n, k]; infinite where the tile cannot be used.

    step, block, sums  as TILES, BLOCK and SUM have them
    """
    blocks, steps = cdiv(m, tile.block_m) * cdiv(n, tile.block_n), cdiv(k, 64)
    own, besides = busiest(tile, blocks, steps, sms, block, sums)
    if tile.shared and own < inf:
        alone, share = share_out(blocks, steps, sms)
        if blocks - alone > LOCKS * cdiv(n, 64):
            return inf
        if share < steps:
            besides += max(0, again(tile, m, k, blocks - alone) / (MEMORY * sms) - share * step)
    return own * step + besides


def usable(tile: WideTile, m: int) -> bool:
    """Whether the tile is one for m rows: many of them in blocks of few would decode everything again and again."""
    return tile.block_m >= min(m, 64 if m <= 256 else 128)


@lru_cache(maxsize=8192)
def choose(m: int, spec: Spec, device: torch.device) -> WideTile:
    """The tile with which the busiest multiprocessor is done first."""
    candidates = [(replace(tile, shared=shared), step) for tile, step in TILES for shared in (False, True) if usable(tile, m)]
    return min(candidates, key=lambda entry: cycles(*entry, m, spec.n, spec.k, multiprocessors(device)))[0]


def unaligned(name: str, t: Tensor) -> str | None:
    """Why TMA cannot read or write the rows of a matrix of 16-bit values, as a sentence; None where it can."""
    if t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16:
        return f"TMA wants rows of {name} that begin at multiples of 16 bytes; they are {t.stride(0)} columns apart, from {t.data_ptr():#x}"
    return None


def refuses(spec: Spec, x: Tensor, out: Tensor) -> str | None:
    """Why `linear` cannot compute out from x, as a sentence; None where it can."""
    if not on_hopper():
        return "the wide kernel is made for Hopper"
    if spec.code is None:
        return "the matrix is not quantized"
    return unaligned("x", x) or unaligned("out", out)


def suits(m: int, spec: Spec) -> bool:
    """Whether this is quicker than kernel.py for m rows."""
    return any(m >= rows and spec.n * spec.k >= weights and spec.k >= columns for rows, weights, columns in LEAST.get(spec.bits, ()))


def schedule(blocks: int, steps: int, shared: bool, sms: int) -> tuple[int, int, int]:
    """(programs, blocks that they compute alone, steps that each does of those which they share) for a product of so many blocks of so many steps."""
    return (sms, *share_out(blocks, steps, sms)) if shared else (min(sms, blocks), blocks, 1)


@lru_cache(maxsize=8192)
def rows_by_tma(spec: Spec, tile: WideTile, m: int, x: Place, stride_x: int, y: Place, stride_y: int) -> dict[str, TensorDescriptor]:
    """Descriptors of x and y, by argument."""
    of = {"x": (x, spec.k, stride_x), "part": (x, spec.k, stride_x), "y": (y, spec.n, stride_y)}
    return {a: TensorDescriptor(place, [m, n], [stride, 1], *blocks_of(spec, tile)[a]) for a, (place, n, stride) in of.items()}


@lru_cache(maxsize=8192)
def weights_by_tma(spec: Spec, tile: WideTile, codes: Place, scale: Place | None, zero: Place | None) -> dict[str, TensorDescriptor]:
    """Descriptors of what a layer stores, by argument: those that TMA reads."""
    found = {}
    for name, place in (("codes", codes), ("scale", scale), ("zero", zero)):
        if how := blocks_of(spec, tile).get(name):
            width = how[0][1]
            dtype = codes.dtype if name == "codes" else INTEGERS[16 // width]
            found[name] = TensorDescriptor(place._replace(dtype=dtype), [place.nbytes // (width * dtype.itemsize), width], [width, 1], *how)
    return found


@cache
def _launcher(spec: Spec, dtype: torch.dtype, tile: WideTile, bias: bool) -> Launcher:
    return Launcher(wide_kernel, **constants(spec, dtype, tile), BIAS=bias, launch_pdl=True)


class Prepared(NamedTuple):
    """What follows from a product's sizes: how it is launched.

    programs, sizes  the grid, and the kernel's arguments `steps`, `alone`, `share`, `stripe_m`
    sharing          blocks that programs share
    """

    tile: WideTile
    launch: Launcher
    programs: int
    sizes: tuple[int, int, int, int]
    sharing: int


@lru_cache(maxsize=8192)
def prepare(m: int, spec: Spec, dtype: torch.dtype, device: torch.device, bias: bool, tile: WideTile | None) -> Prepared:
    """dtype: of x; tile None: by the sizes."""
    tile = tile or choose(m, spec, device)
    blocks, steps = cdiv(m, tile.block_m) * cdiv(spec.n, tile.block_n), cdiv(spec.k, 64)
    programs, alone, share = schedule(blocks, steps, tile.shared, multiprocessors(device))
    return Prepared(tile, _launcher(spec, dtype, tile, bias), programs, (steps, alone, share, tile.stripe_m), blocks - alone)


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None, tile: WideTile | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias. x and out are bfloat16 or float16, and `refuses` has nothing against them; M > 0.

    tile  None: by the sizes
    Raises ValueError where there are fewer locks than blocks that share K.
    """
    t = named("triton", spec, tensors)
    m, codes, row, scale, zero = x.shape[0], t["codes"], t["row"], t.get("scale"), t.get("zero")
    tile, launch, programs, sizes, sharing = prepare(m, spec, x.dtype, x.device, bias is not None, tile)
    work = row
    if tile.shared:
        if sharing > t["locks"].numel():
            raise ValueError(f"{sharing} blocks share K, and there are {t['locks'].numel()} locks")
        work = torch.empty(2 * programs * tile.block_n * tile.block_m, dtype=torch.float32, device=x.device)
    rows = rows_by_tma(spec, tile, m, Place.of(x), x.stride(0), Place.of(out), out.stride(0))
    w = weights_by_tma(spec, tile, Place.of(codes), Place.of(scale), Place.of(zero))
    launch(
        (programs,),
        rows["x"], rows["part"], w["codes"], row, w.get("scale", row), w.get("zero", row if zero is None else zero), row if bias is None else bias,
        rows["y"], work, t["locks"],
        m, spec.n, codes.shape[0], codes.shape[1], 64 * codes.shape[0], *sizes,
    )  # fmt: skip
