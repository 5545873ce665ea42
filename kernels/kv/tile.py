"""Device functions that load codes from a page and make 16-bit floats of them, as a tensor core's register operand.

A page is cut along its tokens into W runs of T, one for each warp: every result has W as its first dimension and, compiled, no warp needs
anything from another. The loads take whole blocks (page.py), 16 bytes a lane; the reshapes and permutations say in which order the words lie,
and compile to nothing.

Codes come as a constant power of two plus the code, exactly, because they are put into that float's mantissa. Nothing is subtracted or
scaled here: the kernels take the constant out of the finished sums.

    keys    float16   4 bits: 1024 + c, 64 + c, 1024 + c, 64 + c      (the second and fourth code stay where they are, four bits up)
                      5 bits: the same;   8 bits: 1024 + c, 1024 + c
    values  bfloat16  4 bits: 128 + c, four times;   8 bits: c - 128, twice (bfloat16 has no room for a constant)

`value_codes` takes less: a code's bits and nothing else are a bfloat16 too, c * 2 ** -133, which the tensor core multiplies like any other.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from qplugins.kernels.common.device import INTERPRET, from_bits, round_to
from qplugins.kernels.kv.page import Page, Words, _pow2
from qplugins.kernels.kv.rotation import block


@triton.jit
def key_offset(piece: tl.constexpr, BITS: tl.constexpr):
    """What the decoded keys of a piece are above code - 2 ** (BITS - 1)."""
    if BITS == 8:
        return 1024.0 + 128.0
    else:
        return (64.0 if piece % 2 else 1024.0) + (16.0 if BITS == 5 else 8.0)


@triton.jit
def value_offset(BITS: tl.constexpr):
    return 0.0 if BITS == 8 else 136.0


@triton.jit
def blocks(words, PIECES: tl.constexpr, JP: tl.constexpr, A: tl.constexpr, W: tl.constexpr):
    """int16 [JP, A, W, 256]: the blocks of a matrix of words; JP is PIECES padded to a power of two, A the blocks of a run of tokens."""
    i = tl.arange(0, JP * A * W)
    p = i // (A * W)
    # the run is what changes fastest, so that Triton gives each warp its own
    at = words + ((p * W + i % W) * A + i // W % A)[:, None] * 256 + tl.arange(0, 256)[None, :]
    if JP == PIECES:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(p < PIECES)[:, None], other=0)
    return x.reshape(JP, A, W, 256)


@triton.jit
def key_words(x, JP: tl.constexpr, A: tl.constexpr, W: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    """Blocks -> [W, T, 4, U]: a token's words by lane, U = JP * WIDE of them."""
    x = x.reshape(JP, A, W, 8, 4, N, WIDE).permute(2, 1, 5, 3, 4, 0, 6)
    return x.reshape(W, A * N * 8, 4, JP * WIDE)


@triton.jit
def by_columns(x, W: tl.constexpr, T: tl.constexpr, U: tl.constexpr):
    """[W, T, 4, U] -> [W, T, 4 * U]: words of a lane by twos, as the operand has them. Column (u // 2, lane, u % 2) of the result is word u."""
    return x.reshape(W, T, 4, U // 2, 2).permute(0, 1, 3, 2, 4).reshape(W, T, 4 * U)


@triton.jit
def key_column(k, U: tl.constexpr, WIDE: tl.constexpr):
    """Which column of words the operand's column k (0 .. 4U - 1) is."""
    u = k // 8 * 2 + k % 2
    return u // WIDE * (4 * WIDE) + k // 2 % 4 * WIDE + u % WIDE


@triton.jit
def value_words(x, JP: tl.constexpr, A: tl.constexpr, W: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    """Blocks -> [W, 4U, T]: row r is column `value_column(r)` of words, transposed."""
    x = x.reshape(JP, A, W, 8, 4, N, WIDE // 2, 2).permute(2, 0, 6, 3, 1, 5, 4, 7)
    return x.reshape(W, JP * WIDE * 4, A * N * 8)


@triton.jit
def value_column(r, WIDE: tl.constexpr):
    """Which column of words the operand's row r is."""
    return r // (4 * WIDE) * (4 * WIDE) + r % 8 * (WIDE // 2) + r // 8 % (WIDE // 2)


# ---- words -> 16-bit floats

# ptxas gives an instruction one constant at most. (x & mask) | constant is one instruction only if the mask is in a register and looks as if it
# could be anything, so kernels get masks as operands: $2 = 0x000F000F, from `nibble` of an argument that the compiler knows nothing of.
# Each code has an assembly of its own, so that a kernel can use up one before it decodes the next: registers are scarce.

_KEYS4_0 = tl.constexpr("lop3.b32 $0, $1, $2, 0x64006400, 0xEA;")
_KEYS4_1 = tl.constexpr("{ .reg .b32 m; shl.b32 m, $2, 4; lop3.b32 $0, $1, m, 0x54005400, 0xEA; }")
_KEYS4_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, $2, 0x64006400, 0xEA; }")
_KEYS4_3 = tl.constexpr("{ .reg .b32 t, m; shl.b32 m, $2, 4; shr.b32 t, $1, 8; lop3.b32 $0, t, m, 0x54005400, 0xEA; }")

# the fifth bit of code q, bit q of $2's halves once shifted right by $3, put above the four bits that are in $1
_FIFTH_0 = tl.constexpr(
    "{ .reg .b32 h, s; and.b32 s, $3, 31; shr.b32 h, $2, s; shl.b32 h, h, 4; and.b32 h, h, 0x00100010; or.b32 $0, $1, h; }"
)
_FIFTH_1 = tl.constexpr(
    "{ .reg .b32 h, s; and.b32 s, $3, 31; shr.b32 h, $2, s; shl.b32 h, h, 7; and.b32 h, h, 0x01000100; or.b32 $0, $1, h; }"
)
_FIFTH_2 = tl.constexpr(
    "{ .reg .b32 h, s; and.b32 s, $3, 31; shr.b32 h, $2, s; shl.b32 h, h, 2; and.b32 h, h, 0x00100010; or.b32 $0, $1, h; }"
)
_FIFTH_3 = tl.constexpr(
    "{ .reg .b32 h, s; and.b32 s, $3, 31; shr.b32 h, $2, s; shl.b32 h, h, 5; and.b32 h, h, 0x01000100; or.b32 $0, $1, h; }"
)

_KEYS8_0 = tl.constexpr("{ .reg .b32 t; and.b32 t, $1, 0x00FF00FF; or.b32 $0, t, 0x64006400; }")
_KEYS8_1 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 t, t, 0x00FF00FF; or.b32 $0, t, 0x64006400; }")

_VALUES4_0 = tl.constexpr("lop3.b32 $0, $1, $2, 0x43004300, 0xEA;")
_VALUES4_1 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; lop3.b32 $0, t, $2, 0x43004300, 0xEA; }")
_VALUES4_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; lop3.b32 $0, t, $2, 0x43004300, 0xEA; }")
_VALUES4_3 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 12; lop3.b32 $0, t, $2, 0x43004300, 0xEA; }")

# the lowest bit of a bfloat16 whose exponent is 0 or 1 is worth 2 ** -133: c, and c four bits up, though its first bit is the exponent's
_CODES4_0 = tl.constexpr("and.b32 $0, $1, 0x000F000F;")
_CODES4_1 = tl.constexpr("and.b32 $0, $1, 0x00F000F0;")
_CODES4_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x000F000F; }")
_CODES4_3 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00F000F0; }")

# 128 + the low seven bits, less 128 where the eighth is set and 256 where it is not; a * 1 + b, which sm_80 has too
_VALUES8_0 = tl.constexpr("""{
    .reg .b32 t, m, one;
    mov.b32 one, 0x3F803F80;
    and.b32 t, $1, 0x007F007F; or.b32 t, t, 0x43004300;
    and.b32 m, $1, 0x00800080; xor.b32 m, m, 0xC380C380;
    fma.rn.bf16x2 $0, t, one, m;
}""")
_VALUES8_1 = tl.constexpr("""{
    .reg .b32 t, m, one;
    mov.b32 one, 0x3F803F80;
    shr.b32 t, $1, 8; and.b32 m, t, 0x00800080; and.b32 t, t, 0x007F007F; or.b32 t, t, 0x43004300;
    xor.b32 m, m, 0xC380C380;
    fma.rn.bf16x2 $0, t, one, m;
}""")


@triton.jit
def nibble(unknown):
    """int16 15; `unknown` is an int32 argument of the kernel that is not negative."""
    return (15 + (unknown >> 31)).to(tl.int16)


@triton.jit
def _float16(asm: tl.constexpr, x, mask):
    return tl.inline_asm_elementwise(asm, "=r,r,r", [x, tl.full(x.shape, mask, tl.int16)], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _bfloat16(asm: tl.constexpr, x, mask):
    return tl.inline_asm_elementwise(asm, "=r,r,r", [x, tl.full(x.shape, mask, tl.int16)], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _fifth(asm: tl.constexpr, low, high, shift):
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [low, high, shift], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def keys4(x, piece: tl.constexpr, mask, PTX: tl.constexpr):
    """int16 words -> the code `piece` of each, see the top. mask: `nibble`."""
    if PTX:
        if piece == 0:
            return _float16(_KEYS4_0, x, mask)
        elif piece == 1:
            return _float16(_KEYS4_1, x, mask)
        elif piece == 2:
            return _float16(_KEYS4_2, x, mask)
        else:
            return _float16(_KEYS4_3, x, mask)
    else:
        x = x.to(tl.int32) >> (piece // 2 * 8)
        return from_bits(x & 0xF0 | 0x5400 if piece % 2 else x & 0xF | 0x6400, tl.float16)


@triton.jit
def keys5(x, high, piece: tl.constexpr, mask, W: tl.constexpr, T: tl.constexpr, U: tl.constexpr, PTX: tl.constexpr):
    """int16 words [W, T, 4, U] and those of the fifth bits [W, T, 4, U / 4] -> the code `piece`, [W, T, 4, U]."""
    shift = tl.broadcast_to(4 * tl.arange(0, 4)[None, None, None, :, None], (W, T, 4, 4, U // 4)).to(tl.int16)
    high = tl.broadcast_to(high[:, :, :, None, :], (W, T, 4, 4, U // 4))
    if PTX:
        low = keys4(x, piece, mask, PTX).reshape(W, T, 4, 4, U // 4)
        if U == 4:
            # the two values of an instruction are of two quarters, whose bits lie at different places
            high = high >> shift
            shift = tl.zeros_like(shift)
        if piece == 0:
            k = _fifth(_FIFTH_0, low, high, shift)
        elif piece == 1:
            k = _fifth(_FIFTH_1, low, high, shift)
        elif piece == 2:
            k = _fifth(_FIFTH_2, low, high, shift)
        else:
            k = _fifth(_FIFTH_3, low, high, shift)
    else:
        x = x.reshape(W, T, 4, 4, U // 4).to(tl.int32) >> (piece // 2 * 8)
        bit = high.to(tl.int32) >> shift.to(tl.int32) + piece & 1
        k = from_bits(x & 0xF0 | bit << 8 | 0x5400 if piece % 2 else x & 0xF | bit << 4 | 0x6400, tl.float16)
    return k.reshape(W, T, 4, U)


@triton.jit
def keys8(x, piece: tl.constexpr, mask, PTX: tl.constexpr):
    """int16 words -> the code `piece` of each."""
    if PTX:
        return _float16(_KEYS8_1 if piece else _KEYS8_0, x, mask)
    else:
        return from_bits(x.to(tl.int32) >> (8 * piece) & 0xFF | 0x6400, tl.float16)


@triton.jit
def values4(x, piece: tl.constexpr, mask, PTX: tl.constexpr):
    if PTX:
        if piece == 0:
            return _bfloat16(_VALUES4_0, x, mask)
        elif piece == 1:
            return _bfloat16(_VALUES4_1, x, mask)
        elif piece == 2:
            return _bfloat16(_VALUES4_2, x, mask)
        else:
            return _bfloat16(_VALUES4_3, x, mask)
    else:
        return from_bits(x.to(tl.int32) >> (4 * piece) & 0xF | 0x4300, tl.bfloat16)


@triton.jit
def _codes(asm: tl.constexpr, x):
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def codes4(x, piece: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        if piece == 0:
            return _codes(_CODES4_0, x)
        elif piece == 1:
            return _codes(_CODES4_1, x)
        elif piece == 2:
            return _codes(_CODES4_2, x)
        else:
            return _codes(_CODES4_3, x)
    else:
        return round_to((x.to(tl.int32) >> (4 * piece) & 0xF).to(tl.float32), tl.bfloat16)


@triton.jit
def values8(x, piece: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        return _codes(_VALUES8_1 if piece else _VALUES8_0, x)
    else:
        x = x.to(tl.int32) >> (8 * piece)
        return from_bits(x & 0x7F | 0x4300, tl.bfloat16) + from_bits(x & 0x80 ^ 0xC380, tl.bfloat16)


@triton.jit
def scale_and_zero(pair):
    """32-bit words -> float32 scale and zero."""
    return (
        pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
    )


@triton.jit
def rotation_sign(i, j, BLOCK: tl.constexpr):
    """float32: sqrt(BLOCK) * R[i, j] of rotation.py for two integer tensors: 1, -1, or 0 outside of R's blocks."""
    x = i & j & (BLOCK - 1)
    x ^= x >> 4
    odd = 0x6996 >> (x & 15) & 1
    sign = 1.0 - 2.0 * odd.to(tl.float32)
    return tl.where(i // BLOCK == j // BLOCK, sign, 0.0)


@triton.jit
def load_keys(
    words, high_words, KB: tl.constexpr, PIECES: tl.constexpr, JP: tl.constexpr, A: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
    HIGH_A: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A page's words of keys [W, T, 4, U], and those of the fifth bits [W, T, 4, U / 4] (the same again where keys have none)."""
    x = key_words(blocks(words, PIECES, JP, A, W), JP, A, W, N, WIDE)
    if KB == 5:
        return x, key_words(blocks(high_words, 1, 1, HIGH_A, W), 1, HIGH_A, W, HIGH_N, HIGH_WIDE)
    else:
        return x, x


@triton.jit
def keys(x, high, piece: tl.constexpr, mask, KB: tl.constexpr, W: tl.constexpr, T: tl.constexpr, U: tl.constexpr, PTX: tl.constexpr):
    """A piece of a page's keys as float16 [W, T, 4U]."""
    if KB == 8:
        k = keys8(x, piece, mask, PTX)
    elif KB == 5:
        k = keys5(x, high, piece, mask, W, T, U, PTX)
    else:
        k = keys4(x, piece, mask, PTX)
    return by_columns(k, W, T, U)


@triton.jit
def load_values(words, PIECES: tl.constexpr, JP: tl.constexpr, A: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr):
    """A page's words of values [W, 4U, T], transposed."""
    return value_words(blocks(words, PIECES, JP, A, W), JP, A, W, N, WIDE)


@triton.jit
def values(x, piece: tl.constexpr, mask, VB: tl.constexpr, PTX: tl.constexpr):
    """A piece of a page's values as bfloat16 [W, 4U, T]."""
    if VB == 8:
        return values8(x, piece, PTX)
    else:
        return values4(x, piece, mask, PTX)


@triton.jit
def value_codes(x, piece: tl.constexpr, VB: tl.constexpr, PTX: tl.constexpr):
    """A piece of a page's values for a product, bfloat16 [W, 4U, T]: code - 2 ** (VB - 1) + `code_offset`, in units that `up` and `down` are for. The
    tensor core takes such numbers as they are; other instructions may take them for 0."""
    if VB == 8:
        return values8(x, piece, PTX)
    else:
        return codes4(x, piece, PTX)


@triton.jit
def code_offset(VB: tl.constexpr):
    return 0.0 if VB == 8 else 8.0


@triton.jit
def up(VB: tl.constexpr, PTX: tl.constexpr):
    """What a product's other operand is multiplied by, so that no sum that matters is below 2 ** -126, nor that operand's own above 2 ** 127."""
    return 2.0**64 if PTX and VB != 8 else 1.0


@triton.jit
def down(piece: tl.constexpr, VB: tl.constexpr, PTX: tl.constexpr):
    """What takes `up` and the unit of a piece's codes out of a sum."""
    return (2.0**65 if piece % 2 else 2.0**69) if PTX and VB != 8 else 1.0


# ---- launch

PTX = not INTERPRET.value and torch.version.hip is None  # whether to write instructions for two values by hand


def _words(m: Words, runs: int) -> tuple[int, int, int, int, int]:
    """columns' pieces, those padded, blocks of a run of tokens, tokens and words of a lane."""
    return m.pieces, _pow2(m.pieces), m.groups // runs, m.n, m.w


@cache
def page_constants(page: Page, runs: int) -> dict[str, int]:
    """The page as compile-time constants, for kernels that cut it into so many runs of tokens."""
    found: dict[str, int] = {
        "P": page.page_size, "D": page.head_dim, "DV": page.v_head_dim, "KB": page.k_bits, "VB": page.v_bits, "S": page.sinks,
        "MEAN": page.mean, "ROTATE": page.rotate, "BLOCK_K": block(page.head_dim), "BLOCK_V": block(page.v_head_dim),
        "DP": _pow2(page.head_dim), "DVP": _pow2(page.v_head_dim), "KC": page.k.columns, "VC": page.v.columns,
    }  # fmt: skip
    found |= zip(("K_PIECES", "K_JP", "K_A", "K_N", "K_WIDE"), _words(page.k, runs), strict=True)
    found |= zip(("V_PIECES", "V_JP", "V_A", "V_N", "V_WIDE"), _words(page.v, runs), strict=True)
    _, _, found["HIGH_A"], found["HIGH_N"], found["HIGH_WIDE"] = _words(page.high, runs) if page.high else (0,) * 5
    return found | {name.upper(): at for name, at in page.offsets.items()}


def runs_of(page: Page, tokens: int) -> int:
    """Runs of so many tokens that a page is cut into; of more, where a block of words has more."""
    return page.page_size // max(tokens, *(8 * m.n for m in (page.k, page.v, page.high) if m))
