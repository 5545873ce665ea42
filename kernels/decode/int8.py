"""int8, offset binary: the pattern c stands for c - 128."""

import torch
import triton
import triton.language as tl

from qplugins.kernels.common.device import from_bits
from qplugins.kernels.decode.code import Code

INT8 = Code("int8", 8, torch.arange(256, dtype=torch.float32) - 128, (tuple(range(8)), tuple(range(8, 16))))


@triton.jit
def decode_int8(word, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 words -> the two codes c as c - 128, exactly.

    float16 has the mantissa for 1024 + c. bfloat16 has seven bits: 128 + (c & 127) exactly, less 128 where bit 7 is set and 256 where not.
    """
    w = word.to(tl.int32)
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 t, u, v, one;
                mov.b32 one, 0x3F803F80;
                and.b32 t, $2, 0x007F007F;
                or.b32 t, t, 0x43004300;
                and.b32 u, $2, 0x00800080;
                xor.b32 u, u, 0xC380C380;
                shr.b32 v, $2, 8;
                fma.rn.bf16x2 $0, t, one, u;
                and.b32 t, v, 0x007F007F;
                or.b32 t, t, 0x43004300;
                and.b32 u, v, 0x00800080;
                xor.b32 u, u, 0xC380C380;
                fma.rn.bf16x2 $1, t, one, u;
                }""",
                "=&r,=&r,r", [word], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 t, v, less;
                mov.b32 less, 0xE480E480;
                and.b32 t, $2, 0x00FF00FF;
                or.b32 t, t, 0x64006400;
                shr.b32 v, $2, 8;
                add.rn.f16x2 $0, t, less;
                and.b32 t, v, 0x00FF00FF;
                or.b32 t, t, 0x64006400;
                add.rn.f16x2 $1, t, less;
                }""",
                "=&r,=&r,r", [word], dtype=(tl.float16,) * 2, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        if dtype == tl.bfloat16:
            d0 = from_bits((w & 0x7F) | 0x4300, dtype) - from_bits((w & 0x80) ^ 0x4380, dtype)
            d1 = from_bits(((w >> 8) & 0x7F) | 0x4300, dtype) - from_bits(((w >> 8) & 0x80) ^ 0x4380, dtype)
            return d0, d1
        else:
            return from_bits((w & 0xFF) | 0x6400, dtype) - 1152.0, from_bits(((w >> 8) & 0xFF) | 0x6400, dtype) - 1152.0
