"""The matrices that are timed: the layers of two Llama models, in random numbers, on the GPU."""

import torch
from torch import Tensor

from qplugins.kernels.linear.layout import pack
from qplugins.kernels.linear.spec import SCALES, Spec
from qplugins.kernels.quantized import QuantizedTensor

# N x K of qkv, o, gate_up and down
MODELS = {
    "8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
# name -> (code, scale, group, zero points)
FORMATS = {
    "nvfp4": ("e2m1", "e4m3", 16, False),
    "int4_g128": ("int4", "bf16", 128, False),
    "int4_g128_asym": ("int4", "bf16", 128, True),
    "mxfp4": ("e2m1", "e8m0", 32, False),
    "fp8": ("e4m3", "f32", None, False),
    "int8": ("int8", "bf16", None, False),
}


def random_matrix(name: str, n: int, k: int) -> QuantizedTensor:
    """Codes of all values, scales of about 1 / sqrt(K) over the code's range, on the GPU."""
    code, scale, group, zero_point = FORMATS[name]
    bits = 4 if code in ("e2m1", "int4") else 8
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda")
    if code == "e4m3":
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    largest = {"e2m1": 6, "e4m3": 448, "int4": 8, "int8": 128}[code]
    s = (torch.rand(n, k // (group or k), device="cuda") + 0.5) * k**-0.5 / largest
    factor = None
    if scale == "e4m3":
        factor = s.amax() / 448
        s = (s / factor).to(torch.float8_e4m3fn)
    elif scale == "e8m0":
        s = (torch.log2(s).floor() + 127).to(torch.uint8)
    else:
        s = s.to(SCALES[scale])
    zero = torch.randint(-8, 8, s.shape, dtype=torch.int8, device="cuda") if zero_point else None
    return QuantizedTensor(code, codes, s, zero, factor)


def layer(name: str, n: int, k: int, count: int, q: QuantizedTensor | None = None) -> list[tuple[Spec, list[Tensor]]]:
    """`count` copies of a packed matrix, the first of `q`; the others have its tiles in another order, which makes them no other work."""
    w = pack(random_matrix(name, n, k) if q is None else q, "triton")
    return [(w.spec, [t.roll(i, 0) if j == 0 else t.clone() if i else t for j, t in enumerate(w.tensors)]) for i in range(count)]
