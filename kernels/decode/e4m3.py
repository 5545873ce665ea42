"""e4m3, the 8-bit float: sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinity, 0x7f and 0xff are NaN; largest 448
(OCP 8-bit floating point 1.0). torch calls it float8_e4m3fn."""

import torch
import triton
import triton.language as tl

from qplugins.kernels.common.device import from_bits
from qplugins.kernels.decode.code import Code

MAX = 448.0

E4M3 = Code(
    "e4m3", 8, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32), (tuple(range(8)), tuple(range(8, 16)))
)


@triton.jit
def decode_e4m3(word, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 words -> the two codes' values, each times 2 ** -120 (bfloat16) or 2 ** -8 (float16).

    Exponent and mantissa, moved to where the float has its lowest ones, differ only in the bias. NaN reads as 480: checkpoints with one are refused.
    """
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 s, t;
                shl.b32 s, $2, 8;
                and.b32 s, s, 0x80008000;
                shl.b32 t, $2, 4;
                and.b32 t, t, 0x07F007F0;
                or.b32 $0, s, t;
                and.b32 s, $2, 0x80008000;
                shr.b32 t, $2, 4;
                and.b32 t, t, 0x07F007F0;
                or.b32 $1, s, t;
                }""",
                "=&r,=&r,r", [word], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 s, t;
                shl.b32 s, $2, 8;
                and.b32 s, s, 0x80008000;
                shl.b32 t, $2, 7;
                and.b32 t, t, 0x3F803F80;
                or.b32 $0, s, t;
                and.b32 s, $2, 0x80008000;
                shr.b32 t, $2, 1;
                and.b32 t, t, 0x3F803F80;
                or.b32 $1, s, t;
                }""",
                "=&r,=&r,r", [word], dtype=(tl.float16,) * 2, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        w = word.to(tl.int32)
        up: tl.constexpr = 4 if dtype == tl.bfloat16 else 7
        d0 = ((w << 8) & 0x8000) | ((w & 0x7F) << up)
        d1 = (w & 0x8000) | (((w >> 8) & 0x7F) << up)
        return from_bits(d0, dtype), from_bits(d1, dtype)
