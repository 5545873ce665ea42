"""What each implementation cannot run, each as a sentence; `refuses` returns None where it can.

triton      any code and scale, 16-bit activations, on a GPU that Triton compiles for
scaled_mm   e4m3 weights with one scale a row or a matrix, activations rounded to e4m3: torch._scaled_mm
torch       a matrix that is not quantized
reference   everything, slowly: float32 products of a block of decoded rows at a time
"""

from collections.abc import Callable

import torch

from qplugins.kernels.linear.layout import scale_word_bits, tile_k
from qplugins.kernels.linear.spec import Spec


def _triton(spec: Spec, device: torch.device, capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the Triton kernels run on a GPU, not on {device.type}"
    if capability is not None and capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the Triton kernel multiplies bfloat16 and float16, not {dtype}"
    if spec.code is None:
        return "the matrix is not quantized"
    if spec.zero_point and spec.code not in ("int4", "int8"):
        return f"zero points belong to integer codes, not to {spec.code}"
    if spec.group is not None and (spec.group < 16 or spec.group & (spec.group - 1)):
        return f"the Triton kernel reads groups of 16, 32, 64 ... columns; this one has {spec.group}"
    if spec.group is not None and scale_word_bits(spec) > 64:
        return f"the Triton kernel reads {spec.scale} scales of groups of at least {tile_k(spec)} columns; this one has {spec.group}"
    if spec.zero_point and scale_word_bits(spec, zero=True) > 64:
        return f"the Triton kernel reads zero points of groups of at least {tile_k(spec) // 2} columns; this one has {spec.group}"
    return None


def _scaled_mm(spec: Spec, device: torch.device, capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    if spec.activation is None:
        return "the layer's activations are to stay in 16 bits"
    if spec.code != "e4m3" or spec.group is not None:
        return f"torch._scaled_mm multiplies e4m3 weights with a scale a row or a matrix; this is {spec}"
    if device.type != "cuda":
        return f"FP8 matrix products need a GPU, not {device.type}"
    if torch.version.hip is not None:
        return "FP8 matrix products on AMD GPUs use another e4m3 before gfx950, and are not supported"
    if capability is not None and capability < (8, 9):
        return f"FP8 matrix products need compute capability 8.9, the device has {capability[0]}.{capability[1]}"
    if dtype != torch.bfloat16:
        return f"torch._scaled_mm with a scale a row returns bfloat16, not {dtype}"
    if spec.k % 16 or spec.n % 16:
        return f"torch._scaled_mm needs multiples of 16; the matrix is {spec.n} x {spec.k}"
    return None


def _torch(spec: Spec, device: torch.device, capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    return None if spec.code is None else "the matrix is quantized"


def _reference(spec: Spec, device: torch.device, capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    return None


IMPLEMENTATIONS: dict[str, Callable[[Spec, torch.device, tuple[int, int] | None, torch.dtype], str | None]] = {
    "torch": _torch,
    "scaled_mm": _scaled_mm,
    "triton": _triton,
    "reference": _reference,
}
"""In the order of preference."""


def refuses(
    implementation: str,
    spec: Spec,
    device: torch.device | str,
    capability: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Why `implementation` cannot run `spec` there, as a sentence; None where it can.

    capability  the CUDA compute capability, (9, 0); None where it is not known or means nothing
    dtype       of the activations
    """
    return IMPLEMENTATIONS[implementation](spec, torch.device(device), capability, dtype)
