"""The product that every kernel over quantized weights is made of: BLOCK_N rows of a W in the `tiles` layout times BLOCK_M rows of x.

W is the first operand of the tensor core's product, y.T = W x.T: a thread loads 16 bytes of codes, decodes them to what the instruction
wants in that thread's registers, and multiplies. No decoded value passes through shared memory. Reshapes and permutations below say so to
Triton: they name the order in which layout.py put the words, and compile to nothing. On a GPU whose tensor core wants another order, Triton
moves the values, and the result is the same.

What is rounded: x and the result, by their own type, and a scaled weight, once, to x's type. e2m1 with e4m3 or e8m0 scales has few enough
bits for that to be exact, and scales of rows are applied to the float32 sum. What remains, 16-bit scales of groups, adds an error of the
size that x's own rounding has; scaling the sums instead would take BLOCK_M multiplications for every one of these.

Powers of two: what decoding leaves away (`decode/`) and what scales are multiplied by (UP) come back as OUT, a factor of the sum.

Where there are too few blocks to keep the memory busy, split_k programs share a block's K: each leaves its float32 sum in `work`, and the
last to arrive adds them up in the order of K, so that the result does not depend on who was last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import INTERPRET, add, dot, fma, from_bits, mul, on_hopper, prefetch, round_to, wait_for_dot
from qplugins.kernels.decode.e2m1 import decode_e2m1
from qplugins.kernels.decode.e4m3 import decode_e4m3
from qplugins.kernels.decode.int4 import decode_int4
from qplugins.kernels.decode.int8 import decode_int8
from qplugins.kernels.linear.layout import tile_k
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import Tile, cdiv

PTX = not INTERPRET.value and torch.version.hip is None


@triton.jit
def block_at(program, blocks_m, blocks_n, stripe_m):
    """(block of x's rows, block of W's rows) of a program: blocks of W next to each other in a stripe of stripe_m blocks of x, so that both
    are found in the L2 cache."""
    stripe = program // (stripe_m * blocks_n)
    height = tl.minimum(blocks_m - stripe * stripe_m, stripe_m)
    inside = program % (stripe_m * blocks_n)
    return stripe * stripe_m + inside % height, inside // height


@triton.jit
def _rows_from_pairs(low, high, BLOCK_N: tl.constexpr, STEP: tl.constexpr):
    """[BLOCK_N / 2, STEP] of rows n and of rows n + 8 -> [BLOCK_N, STEP, 16]: a row's number for 16 columns."""
    both = tl.join(low, high).reshape(BLOCK_N // 16, 8, STEP, 2).permute(0, 3, 1, 2).reshape(BLOCK_N, STEP, 1)
    return tl.broadcast_to(both, (BLOCK_N, STEP, 16))


@triton.jit
def _scale_of(word, SCALE: tl.constexpr, UP: tl.constexpr, dtype: tl.constexpr):
    """The scale in the low bits of an integer, times 2 ** UP, as `dtype`."""
    if SCALE == "e4m3":
        if dtype == tl.bfloat16:
            return from_bits(((word & 0xFF).to(tl.int32) << 4) + ((UP + 117) << 7), dtype)
        else:
            return from_bits(((word & 0xFF).to(tl.int32) << 7) + ((UP + 5) << 10), dtype)
    elif SCALE == "e8m0":
        if dtype == tl.bfloat16:
            return from_bits(((word & 0xFF).to(tl.int32) + UP) << 7, dtype)
        else:
            # float16 ends 2 ** -29 below the row's largest scale
            return from_bits(tl.maximum((word & 0xFF).to(tl.int32) - 112 + UP, 0) << 10, dtype)
    elif SCALE == "f32":
        return round_to(word.to(tl.int32).to(tl.float32, bitcast=True) * 2.0**UP, dtype)
    elif SCALE == "bf16":
        return round_to((word.to(tl.int32) << 16).to(tl.float32, bitcast=True) * 2.0**UP, dtype)
    else:
        return round_to(word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**UP, dtype)


@triton.jit
def _value(
    raw, j: tl.constexpr, scale, zero, CODE: tl.constexpr, SCALE: tl.constexpr, SPAN: tl.constexpr, PER_TILE: tl.constexpr, ZERO: tl.constexpr,
    UP: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Decoded codes j of the words -> (value - zero) * scale * 2 ** UP.

    raw          [BLOCK_N, STEP, 16]
    scale, zero  integers [BLOCK_N / 2, STEP], each with PER_TILE scales of row n, then those of row n + 8
    SPAN         spans of 16 columns that share a scale: code j is in span j
    """
    at: tl.constexpr = j // SPAN
    INT4: tl.constexpr = CODE == "int4"
    # the codes of int4 have units of their own, which scales make up for
    TINY: tl.constexpr = INT4 and dtype == tl.bfloat16
    unit: tl.constexpr = (2.0**-129 if j % 2 else 2.0**-133) if TINY else 1.0
    up: tl.constexpr = UP - 4 * (j % 2) if TINY else UP
    base: tl.constexpr = 8.0 if TINY else 1032.0 if INT4 else 0.0
    if ZERO:
        low = round_to(-(base + (zero >> (16 * at)).to(tl.int16).to(tl.float32)) * unit, dtype)
        high = round_to(-(base + (zero >> (16 * (PER_TILE + at))).to(tl.int16).to(tl.float32)) * unit, dtype)
        raw = add(raw, _rows_from_pairs(low, high, BLOCK_N, STEP), dtype, PTX)
    elif INT4 and not TINY:
        raw = add(raw, tl.full((BLOCK_N, STEP, 16), -base, raw.dtype), dtype, PTX)
    OFFSET: tl.constexpr = TINY and not ZERO  # is taken away in units of the scale, which costs nothing
    if SCALE == "row":
        if OFFSET:
            rows = tl.full((BLOCK_N, STEP, 16), 2.0**up, raw.dtype)
            raw = fma(raw, rows, tl.full((BLOCK_N, STEP, 16), -base * unit * 2.0**up, raw.dtype), dtype, PTX)
        elif up != 0:
            raw = mul(raw, tl.full((BLOCK_N, STEP, 16), 2.0**up, raw.dtype), dtype, PTX)
    else:
        bits: tl.constexpr = 8 if SCALE == "e4m3" or SCALE == "e8m0" else 32 if SCALE == "f32" else 16
        low = _scale_of(scale >> (bits * at), SCALE, up, dtype)
        high = _scale_of(scale >> (bits * (PER_TILE + at)), SCALE, up, dtype)
        rows = _rows_from_pairs(low, high, BLOCK_N, STEP)
        if OFFSET:
            # exact: a power of two
            none = _rows_from_pairs(
                round_to(low.to(tl.float32) * (-base * unit), dtype), round_to(high.to(tl.float32) * (-base * unit), dtype), BLOCK_N, STEP
            )
            raw = fma(raw, rows, none, dtype, PTX)
        else:
            raw = mul(raw, rows, dtype, PTX)
    return raw


@triton.jit
def rows_of_tiles(codes, block_n, first, N, tiles_k, pairs, BLOCK_N: tl.constexpr, STEP: tl.constexpr):
    """Pointers [tiles, STEP, 1024] to the words of STEP tiles from `first` on, of a block of W's rows, and the block's pairs of rows."""
    # blocks past the matrix's last tile read the last one again; their rows are not stored
    tile_n = tl.minimum(block_n * (BLOCK_N // 64) + tl.arange(0, BLOCK_N // 64), tl.cdiv(N, 64) - 1).to(tl.int64)
    pair = block_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    step = tl.arange(0, STEP)
    words = codes + (tile_n[:, None, None] * tiles_k + first + step[None, :, None]) * 1024 + tl.arange(0, 1024)[None, None, :]
    return words, tl.where(pair < pairs, pair, 0)


@triton.jit
def prefetch_tiles(codes, block_n, first, N, tiles_k, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PTX: tl.constexpr):
    """`prefetch` of a block's first STEP tiles of K from `first` on."""
    tile_n = tl.minimum(block_n * (BLOCK_N // 64) + tl.arange(0, BLOCK_N // 64), tl.cdiv(N, 64) - 1).to(tl.int64)
    line = tl.minimum(tl.arange(0, 16 * STEP), (tiles_k - first) * 16 - 1)  # 16 a tile, which lie one after the other
    prefetch(codes + (tile_n[:, None] * tiles_k + first) * 1024 + 64 * line[None, :], PTX)


@triton.jit
def load_groups(
    scale, zero, tile, pairs, pair, CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of tiles of K for pairs of rows; 0 for what there is not. tile, pair: of shapes that broadcast to what `decoded` takes."""
    TILE_K: tl.constexpr = 64 if CODE == "int4" or CODE == "e2m1" else 32
    TILES_PER_GROUP: tl.constexpr = 1 if GROUP <= TILE_K else GROUP // TILE_K
    sw = 0
    zw = 0
    if SCALE != "row":
        sw = tl.load(scale + (tile // TILES_PER_GROUP).to(tl.int64) * pairs + pair)
    if ZERO:
        if GROUP == 0:
            zw = tl.load(zero + pair + 0 * tile)
        else:
            zw = tl.load(zero + (tile // TILES_PER_GROUP).to(tl.int64) * pairs + pair)
    return sw, zw


@triton.jit
def load(
    words, scale, zero, tile, tiles_k, pairs, pair, CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """Codes, scales and zero points of the tiles `tile` [STEP] of K: what `decoded` takes. words, pair: of `rows_of_tiles`."""
    if EVEN_K:
        w = tl.load(words)
    else:
        w = tl.load(words, mask=(tile < tiles_k)[None, :, None], other=0)
        tile = tl.minimum(tile, tiles_k - 1)
    sw, zw = load_groups(scale, zero, tile[None, :], pairs, pair[:, None], CODE, SCALE, GROUP, ZERO)
    return w, sw, zw


@triton.jit
def load_x(xs, k, m_in, K, EVEN_K: tl.constexpr):
    """Columns k of x, transposed: zero past K and in rows that x does not have."""
    if EVEN_K:
        return tl.load(xs, mask=m_in, other=0.0)
    else:
        return tl.load(xs, mask=m_in & (k < K)[:, None], other=0.0)


@triton.jit
def _decode4(
    w, sw, zw, CODE: tl.constexpr, SCALE: tl.constexpr, SPAN: tl.constexpr, PER_TILE: tl.constexpr, ZERO: tl.constexpr, UP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """int16 [BLOCK_N / 64, STEP, 1024] with 4-bit codes, and their scales and zero points -> the weights of the four spans of 16 columns,
    each [BLOCK_N, STEP, 16], times 2 ** UP."""
    # [tiles, STEP, w 4, g 8, t 4, h 2, u 2, p 2] -> rows (tile, w, u, g), columns (h, t, p)
    w = w.reshape(BLOCK_N // 64, STEP, 4, 8, 4, 2, 2, 2).permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(BLOCK_N, STEP, 16)
    if CODE == "e2m1":
        d0, d1, d2, d3 = decode_e2m1(w, dtype, PTX)
    else:
        d0, d1, d2, d3 = decode_int4(w, dtype, PTX)
    d0 = _value(d0, 0, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    d1 = _value(d1, 1, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    d2 = _value(d2, 2, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    d3 = _value(d3, 3, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    return d0, d1, d2, d3


@triton.jit
def _decode2(
    w, sw, zw, CODE: tl.constexpr, SCALE: tl.constexpr, SPAN: tl.constexpr, PER_TILE: tl.constexpr, ZERO: tl.constexpr, UP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The same for 8-bit codes: two spans of 16 columns."""
    w = w.reshape(BLOCK_N // 64, STEP, 4, 8, 4, 2, 2, 2).permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(BLOCK_N, STEP, 16)
    if CODE == "e4m3":
        d0, d1 = decode_e4m3(w, dtype, PTX)
    else:
        d0, d1 = decode_int8(w, dtype, PTX)
    d0 = _value(d0, 0, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    d1 = _value(d1, 1, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    return d0, d1


@triton.jit
def decoded(
    w, sw, zw, CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What `load` returned -> the weights [BLOCK_N, columns of STEP tiles], but for `row` and OUT."""
    SPANS: tl.constexpr = 4 if CODE == "int4" or CODE == "e2m1" else 2  # codes a word
    PER_TILE: tl.constexpr = 1 if GROUP == 0 or GROUP >= 16 * SPANS else 16 * SPANS // GROUP  # scales of a row in one tile
    SPAN: tl.constexpr = SPANS // PER_TILE
    if SPANS == 4:
        d0, d1, d2, d3 = _decode4(w, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
        # join appends an axis: [n, step, c, j & 1, j >> 1]
        d = tl.join(tl.join(d0, d1), tl.join(d2, d3)).permute(0, 1, 4, 3, 2)
    else:
        d0, d1 = _decode2(w, sw, zw, CODE, SCALE, SPAN, PER_TILE, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
        d = tl.join(d0, d1).permute(0, 1, 3, 2)
    return d.reshape(BLOCK_N, STEP * 16 * SPANS)


@triton.jit
def product(
    xs, m_in, codes, scale, zero, block_n, share, steps, N, K, tiles_k, pairs,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_M]: rows block_n * BLOCK_N .. of W[N, K], but for `row` and OUT, times rows of x, over one share of K.

    xs     pointers [1, BLOCK_M] to the rows of x       m_in   [1, BLOCK_M], which of them there are
    codes  int16 [tiles_n, tiles_k, 1024]               scale, zero  integers [groups, pairs]
    steps  of a share: each is STEP tiles of K          GROUP  columns that share a scale, 0 for the row
    """
    TILE_K: tl.constexpr = 64 if CODE == "int4" or CODE == "e2m1" else 32
    first = share * steps * STEP  # this share's first tile of K
    step = tl.arange(0, STEP)
    k = first * TILE_K + tl.arange(0, STEP * TILE_K)
    words, pair = rows_of_tiles(codes, block_n, first, N, tiles_k, pairs, BLOCK_N, STEP)
    xs += k[:, None]
    count = tl.minimum(steps, tl.cdiv(tiles_k - first, STEP))

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(0, count):
        xt = load_x(xs, k + i * STEP * TILE_K, m_in, K, EVEN_K)
        w, sw, zw = load(words, scale, zero, first + i * STEP + step, tiles_k, pairs, pair, CODE, SCALE, GROUP, ZERO, EVEN_K)
        d = decoded(w, sw, zw, CODE, SCALE, GROUP, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
        acc = dot(d, xt, wait_for_dot(acc, HOPPER))
        words += STEP * 1024
        xs += STEP * TILE_K
    return acc


@triton.jit
def leave_share(acc, mine, share, lock, split_k, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Stores one share's sum in `mine`, float32 [split_k, BLOCK_N, BLOCK_M] of a block. Whether all others had done so."""
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(mine + share * (BLOCK_N * BLOCK_M) + at, acc)
    tl.debug_barrier()  # all of the program's threads have stored before one of them says so
    return tl.atomic_add(lock, 1, sem="acq_rel") == split_k - 1


@triton.jit
def sum_shares(mine, lock, split_k, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """What `leave_share` stored, added up; the lock is left as it was found."""
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for s in range(0, split_k):
        acc += tl.load(mine + s * (BLOCK_N * BLOCK_M) + at, cache_modifier=".cg")
    tl.store(lock, 0)
    return acc


def of_groups(t: dict[str, Tensor], row: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What groups have of a layer's `named` tensors: scale, zero point, with `row` in place of what there is not, and one of them that there is."""
    scale, zero = t.get("scale"), t.get("zero")
    return row if scale is None else scale, row if zero is None else zero, zero if scale is None else scale


def powers(spec: Spec, dtype: torch.dtype) -> tuple[int, int]:
    """(UP, power of two of OUT): scales are multiplied by 2 ** UP, and `row` makes up for that and for what decoding left away.

    UP is as large as the scale's and the product's exponents allow, so that no product is subnormal where a weight is not.
    """
    bf16 = dtype == torch.bfloat16
    # decoding gives values times 2 ** -short
    short = {"e2m1": 126 if bf16 else 14, "e4m3": 120 if bf16 else 8, "int4": 133 if bf16 else 0}.get(spec.code, 0)
    scale = "row" if spec.group is None else spec.scale
    if bf16:
        up = {"e2m1": 119, "int4": 119, "e4m3": 119 if scale == "e4m3" else 120}.get(spec.code, 0)
    elif scale == "row":
        up = 0
    elif scale == "e4m3":
        up = {"e2m1": 7, "e4m3": 3}.get(spec.code, -5)
    else:
        up = {"e2m1": 15 if scale == "e8m0" else 14, "e4m3": 8}.get(spec.code, 0)
    return up, short - up


def shares(tiles_k: int, tile: Tile) -> tuple[int, int]:
    """(split_k, steps of each share): tile.split_k shares where there are as many steps, and none without a step."""
    steps = cdiv(tiles_k, tile.step)
    each = cdiv(steps, min(tile.split_k, steps))
    return cdiv(steps, each), each


def sums_of(blocks: int, split: int, tile: Tile, locks: Tensor) -> Tensor | None:
    """`work` for so many blocks, whose K `split` programs share. Raises ValueError where there are fewer locks than blocks that share K."""
    if split == 1:
        return None
    if blocks > locks.numel():
        raise ValueError(f"{blocks} blocks share K, and there are {locks.numel()} locks")
    return torch.empty(blocks * split * tile.block_n * tile.block_m, dtype=torch.float32, device=locks.device)


def constants(spec: Spec, dtype: torch.dtype, tile: Tile) -> dict:
    """What kernels that call `product` are compiled for. dtype: of x."""
    up, down = powers(spec, dtype)
    return {
        "CODE": spec.code or "plain",
        "SCALE": spec.scale if spec.group else "row",
        "GROUP": spec.group or 0,
        "ZERO": spec.zero_point,
        "UP": up,
        "OUT": 2.0**down,
        "EVEN_K": spec.k % (tile.step * tile_k(spec)) == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "STEP": tile.step,
        "PTX": PTX,
        "HOPPER": on_hopper(),
    }
