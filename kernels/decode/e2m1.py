"""e2m1, the 4-bit float of NVFP4 and MXFP4: bit 3 sign, bits 2..1 exponent (bias 1), bit 0 mantissa (OCP Microscaling 1.0, 5.3.3).

    0 0.5 1 1.5 2 3 4 6 and their negatives; no infinity, no NaN

The three low bits are the top of a 16-bit float's exponent and mantissa in the right order, so a shift and one power of two decode it.
"""

import torch
import triton
import triton.language as tl

from qplugins.kernels.common.device import from_bits
from qplugins.kernels.decode.code import Code

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0

# Shifted left by 0, 3 and 6 the first three codes show their sign at bit 15 and the rest at bits 8..6, where bfloat16 wants them.
# No fourth shift is left that would fit, so the fourth code takes the bits that remain.
PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))

E2M1 = Code("e2m1", 4, torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES)), PLACES)


@triton.jit
def decode_e2m1(word, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 words -> the four codes' values, each times 2 ** -126 (bfloat16) or 2 ** -14 (float16): a tuple of four tensors of the same shape.

    The code's bits in a float's lowest exponent and highest mantissa bit differ from e2m1 only in the exponent's bias, zero and 0.5 included.
    """
    if PTX:
        # two words at a time: masks and shifts cannot tell
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 s, e, m;
                and.b32 $0, $4, 0x81C081C0;
                shl.b32 s, $4, 3;
                and.b32 $1, s, 0x81C081C0;
                shl.b32 e, $4, 6;
                and.b32 $2, e, 0x81C081C0;
                shl.b32 s, $4, 1;
                and.b32 s, s, 0x80008000;
                shr.b32 e, $4, 5;
                and.b32 e, e, 0x01000100;
                shr.b32 m, $4, 4;
                and.b32 m, m, 0x00C000C0;
                or.b32 s, s, e;
                or.b32 $3, s, m;
                }""",
                "=&r,=&r,=&r,=&r,r", [word], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 s, e, m;
                and.b32 s, $4, 0x80008000;
                shl.b32 e, $4, 3;
                and.b32 m, e, 0x0E000E00;
                or.b32 $0, s, m;
                and.b32 s, e, 0x80008000;
                shl.b32 e, $4, 6;
                and.b32 m, e, 0x0E000E00;
                or.b32 $1, s, m;
                and.b32 s, e, 0x80008000;
                shl.b32 e, $4, 9;
                and.b32 m, e, 0x0E000E00;
                or.b32 $2, s, m;
                shl.b32 s, $4, 1;
                and.b32 s, s, 0x80008000;
                shr.b32 e, $4, 2;
                and.b32 e, e, 0x08000800;
                shr.b32 m, $4, 1;
                and.b32 m, m, 0x06000600;
                or.b32 s, s, e;
                or.b32 $3, s, m;
                }""",
                "=&r,=&r,=&r,=&r,r", [word], dtype=(tl.float16,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        w = word.to(tl.int32)
        up: tl.constexpr = 0 if dtype == tl.bfloat16 else 3  # float16 has its exponent and mantissa three bits higher
        d0 = (w & 0x8000) | ((w & 0x01C0) << up)
        d1 = ((w << 3) & 0x8000) | (((w << 3) & 0x01C0) << up)
        d2 = ((w << 6) & 0x8000) | (((w << 6) & 0x01C0) << up)
        d3 = ((w << 1) & 0x8000) | ((((w >> 5) & 0x0100) | ((w >> 4) & 0x00C0)) << up)
        return from_bits(d0, dtype), from_bits(d1, dtype), from_bits(d2, dtype), from_bits(d3, dtype)
