"""int4, offset binary: the pattern c stands for c - 8. So compressed-tensors packs it, and so a magic-number decode wants it."""

import torch
import triton
import triton.language as tl

from qplugins.kernels.common.device import from_bits
from qplugins.kernels.decode.code import Code

INT4 = Code("int4", 4, torch.arange(16, dtype=torch.float32) - 8, tuple(tuple(range(4 * j, 4 * j + 4)) for j in range(4)))


@triton.jit
def decode_int4(word, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 words -> the four codes c as 1024 + c (float16): c put in the last mantissa bits of that power. Or, in bfloat16, whose exponent has room
    for what scales then have to be multiplied by, as c * 2 ** -133, and every second one 16 times that: the last bit of a float whose exponent is 0 or 1 is worth 2 ** -133, so a code
    is such a number where it stands, or four bits up."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                and.b32 $0, $4, 0x000F000F;
                and.b32 $1, $4, 0x00F000F0;
                shr.b32 t, $4, 8;
                and.b32 $2, t, 0x000F000F;
                and.b32 $3, t, 0x00F000F0;
                }""",
                "=&r,=&r,=&r,=&r,r", [word], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                and.b32 t, $4, 0x000F000F;
                or.b32 $0, t, 0x64006400;
                shr.b32 t, $4, 4;
                and.b32 t, t, 0x000F000F;
                or.b32 $1, t, 0x64006400;
                shr.b32 t, $4, 8;
                and.b32 t, t, 0x000F000F;
                or.b32 $2, t, 0x64006400;
                shr.b32 t, $4, 12;
                and.b32 t, t, 0x000F000F;
                or.b32 $3, t, 0x64006400;
                }""",
                "=&r,=&r,=&r,=&r,r", [word], dtype=(tl.float16,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        w = word.to(tl.int32)
        if dtype == tl.bfloat16:
            return from_bits(w & 0xF, dtype), from_bits(w & 0xF0, dtype), from_bits(w >> 8 & 0xF, dtype), from_bits(w >> 8 & 0xF0, dtype)
        else:
            d0, d1, d2, d3 = (w & 15) | 0x6400, ((w >> 4) & 15) | 0x6400, ((w >> 8) & 15) | 0x6400, ((w >> 12) & 15) | 0x6400
            return from_bits(d0, dtype), from_bits(d1, dtype), from_bits(d2, dtype), from_bits(d3, dtype)
