"""Random quantized matrices of any code, scale and group, and what tests of kernels compare with."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from qplugins.kernels.common.device import INTERPRET
from qplugins.kernels.linear import Spec, parse
from qplugins.kernels.linear.spec import SCALES
from qplugins.kernels.quantized import QuantizedTensor


def spec(text: str, n: int, k: int) -> Spec:
    """ "e2m1*e4m3/16" -> its Spec."""
    return parse(f"triton {text} {n}x{k}").shards[0].spec


def quantized(s: Spec, device: torch.device) -> QuantizedTensor:
    """Every code but NaN; scales over several powers of two, zero among the e4m3 ones, of integers on both sides of zero; zero points over their whole
    range."""
    groups = 1 if s.group is None else s.k // s.group
    codes = torch.randint(0, 1 << s.bits, (s.n, s.k), dtype=torch.uint8)
    if s.code == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0
    if s.scale == "e4m3":
        scale = torch.randint(0, 0x7F, (s.n, groups), dtype=torch.uint8).view(torch.float8_e4m3fn)
    elif s.scale == "e8m0":
        scale = torch.randint(105, 125, (s.n, groups), dtype=torch.uint8)
    else:
        scale = (torch.rand(s.n, groups) + 0.5) * torch.exp2(torch.randint(-14, -4, (s.n, groups)))
        if s.code.startswith("int"):
            scale *= torch.randint(0, 2, scale.shape) * 2 - 1
        scale = scale.to(SCALES[s.scale])
    zero = None
    if s.zero_point:
        half = 1 << (s.bits - 1)
        zero = torch.randint(-half, half, (s.n, groups)).to(torch.int8).to(device)
    factor = (torch.rand(()) + 0.5) / 256 if s.scale == "e4m3" else None
    return QuantizedTensor(s.code, codes.to(device), scale.to(device), zero, None if factor is None else factor.to(device))


def jit(function: Callable):
    """`triton.jit` for a kernel in a test: interpreted where the package's own are, which is decided when those are defined."""
    if INTERPRET.value:
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(function)
    return triton.jit(function)


def rel_rms(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
