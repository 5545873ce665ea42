"""What every kernel needs to compute with 16-bit floats, compiled and under Triton's interpreter.

The interpreter (3.9) keeps bfloat16 as bit patterns: it multiplies those in `tl.dot` and in elementwise arithmetic, turns integers into garbage
and rounds in its own way. So there every 16-bit float becomes a float32 as soon as it is made, which holds it exactly.

Compiled for NVIDIA, arithmetic on bfloat16 and float16 comes as PTX for two values at a time: LLVM does not pair them up on its own.
`PTX` (constexpr) says whether to; `dtype` is the type that is meant, whatever a tensor has under the interpreter.
"""

from functools import cache

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@cache
def on_hopper() -> bool:
    """Whether kernels are compiled for Hopper. Asked at the first launch: asking at import would start CUDA in processes that fork later."""
    return not INTERPRET.value and torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@triton.jit
def from_bits(bits, dtype: tl.constexpr):
    """The 16-bit floats of `dtype` whose patterns are the low halves of an integer tensor."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> `dtype`, or as it is under the interpreter."""
    if INTERPRET:
        return x
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, products and sums in float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def add(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """a + b, rounded once. Two tensors of one shape."""
    if PTX:
        # a * 1 + b: sm_80 has no other addition of bfloat16 pairs
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }",
                "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return a + b


@triton.jit
def mul(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """a * b, rounded once. Two tensors of one shape."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 nil; mov.b32 nil, 0x80008000; fma.rn.bf16x2 $0, $1, $2, nil; }",
                "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return a * b


@triton.jit
def fma(a, b, c, dtype: tl.constexpr, PTX: tl.constexpr):
    """a * b + c, rounded once. Three tensors of one shape."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return round_to(a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32), dtype)


@triton.jit
def wait_for_dot(acc, HOPPER: tl.constexpr):
    """acc, the result of the last step's `dot`, for certain finished. To stand in front of a `dot` whose first operand is in registers.

    Hopper's tensor core reads such registers after the instruction was issued. ptxas before CUDA 13.3 lets the next step overwrite them
    earlier than that (triton-lang/triton issue 9433), which shows as a wrong sum now and then. A use of `acc` has Triton wait first.
    """
    if HOPPER:
        return tl.inline_asm_elementwise("// $0", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return acc


def dependent_launch(early: bool = True) -> dict:
    """Constants and options of a launch that may, if `early`, begin while the kernel in front of it on the stream still runs; see `after_previous`."""
    return {"PDL": True, "launch_pdl": True} if early and on_hopper() else {"PDL": False}


@triton.jit
def after_previous(PDL: tl.constexpr):
    """To stand in a kernel launched with `dependent_launch` before anything that another kernel may write is read, and anything that one may read is
    written: waits for the kernel in front of it, and only then lets the next one come up.

    So programs are on their multiprocessors when their inputs are there, instead of being launched then ("programmatic dependent launch",
    CUDA programming guide). In this order there are never more than two kernels' programs at once. Programs go where there is room: let in earlier, those
    of a third went to the multiprocessors that were done first, and for want of balance products of one row took up to half as long again on an H100.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers, PTX: tl.constexpr):
    """Has the L2 cache fetch the lines of 128 bytes that pointers are to. Nothing is read yet, so this may be done before `after_previous`."""
    if PTX:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)
