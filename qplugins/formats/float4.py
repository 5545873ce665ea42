"""nvfp4 and mxfp4: e2m1 codes with an 8-bit scale for every 16 or 32 columns.

    weight_packed        uint8 [N, K / 2], see packing.py
    weight_scale         nvfp4: float8_e4m3fn [N, K / 16]        mxfp4: uint8 [N, K / 32], e8m0 exponents
    weight_global_scale  nvfp4 only, float32 [1]: a divisor, W = code * weight_scale / weight_global_scale
    input_global_scale   nvfp4 only, for hardware that multiplies 4-bit activations; not read here

nvfp4's global scale maps the largest magnitude of the matrix to 6 * 448, so that every block's scale fits e4m3.
compressed-tensors calls them "nvfp4-pack-quantized" and "mxfp4-pack-quantized"; MXFP4 is OCP Microscaling 1.0.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.formats.packing import pack_pairs, unpack_pairs
from qplugins.formats.search import least_squares, quotient
from qplugins.kernels.decode.e2m1 import E2M1, MAX
from qplugins.kernels.decode.e4m3 import MAX as E4M3_MAX
from qplugins.kernels.quantized import QuantizedTensor

# A block's largest magnitude lands on 6, near it, or on 4: between 4 and 6 e2m1 has nothing, so that a block which ends at 4 is finer
# near its end ("Four Over Six", arXiv 2512.02010).
NVFP4_TARGETS = (6.0, 4.0, 5.6, 6.5, 7.0, 7.6)
MORE_TARGETS = (*NVFP4_TARGETS, 3.6, 4.3, 5.0, 5.3, 8.2)  # where it is known which columns matter: a scale that suits these
TINY = 1e-20


def round_e2m1(x: Tensor) -> Tensor:
    """float32 -> the uint8 pattern of the nearest e2m1 value, ties to the even pattern, magnitudes above 6 to 6."""
    m = x.abs().clamp_(max=MAX)
    # Values lie 0.5 apart up to 2, 1 apart up to 4 and 2 apart up to 6. Even multiples of the distance have even patterns, and torch rounds
    # half to even.
    two, four = (m >= 2).to(torch.float32), (m >= 4).to(torch.float32)
    pattern = (m * (2 - two - four / 2)).round_() + 2 * (two + four)
    return (pattern + 8 * torch.signbit(x)).to(torch.uint8)


def _encode(x: Tensor, scale: Tensor) -> Tensor:
    return round_e2m1(x / scale)


def _decode(codes: Tensor, scale: Tensor) -> Tensor:
    return E2M1.values.to(codes.device)[codes.to(torch.int32)] * scale


def _quantize_nvfp4(w: Tensor, amax: Tensor | None, importance: Tensor | None) -> QuantizedTensor:
    largest = (w.abs().amax() if amax is None else amax).to(torch.float32).clamp_min(TINY)
    factor = quotient(largest, MAX * E4M3_MAX)

    def candidates(x: Tensor) -> Iterable[tuple[Tensor]]:
        top = x.abs().amax(-1) / factor
        for target in NVFP4_TARGETS if importance is None else MORE_TARGETS:
            # 2 ** -9 is e4m3's smallest: a block that needs less becomes zeros
            block = quotient(top, target).clamp(2**-9, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
            yield (block * factor,)

    codes, scale = least_squares(w, 16, candidates, _encode, _decode, importance)
    return QuantizedTensor("e2m1", codes, (scale / factor).to(torch.float8_e4m3fn), global_scale=factor)


def _quantize_mxfp4(w: Tensor, amax: Tensor | None, importance: Tensor | None) -> QuantizedTensor:
    def candidates(x: Tensor) -> Iterable[tuple[Tensor]]:
        exponent = torch.log2(x.abs().amax(-1).clamp_min(2.0**-120)).floor()
        # the specification's choice, and twice its scale, under which nothing is clipped; where it is known which columns matter, half of it too, which
        # clips the largest values and is finer for all others
        for shift in (-2, -1) if importance is None else (-2, -1, -3):
            yield (torch.exp2(exponent + shift),)

    codes, scale = least_squares(w, 32, candidates, _encode, _decode, importance)
    return QuantizedTensor("e2m1", codes, (torch.log2(scale).round() + 127).to(torch.uint8))


def _store(q: QuantizedTensor) -> dict[str, Tensor]:
    tensors = {"weight_packed": pack_pairs(q.codes), "weight_scale": q.scale}
    if q.global_scale is not None:
        tensors["weight_global_scale"] = (1 / q.global_scale).reshape(1)
    return tensors


def _read(tensors: Mapping[str, Tensor], n: int, k: int) -> QuantizedTensor:
    divisor = tensors.get("weight_global_scale")
    factor = None if divisor is None else (1 / divisor.to(torch.float32)).reshape(())
    return QuantizedTensor("e2m1", unpack_pairs(tensors["weight_packed"]), tensors["weight_scale"], global_scale=factor)


def _float4(name: str, group_size: int, strategy: str, quantize, scale_dtype: torch.dtype, extra: tuple[Param, ...]) -> Format:
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": strategy,
        "group_size": group_size,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": str(scale_dtype),
        "zp_dtype": str(scale_dtype),
    }
    return Format(
        name,
        params=(Param("weight_packed", torch.uint8, (1, 2)), Param("weight_scale", scale_dtype, (1, group_size)), *extra),
        scheme={"format": f"{name}-pack-quantized", "weights": weights, "input_activations": None},
        code="e2m1",
        group_size=group_size,
        quantize=lambda w, amax=None, importance=None: quantize(w, amax, importance),
        store=_store,
        read=_read,
    )


NVFP4 = _float4(
    "nvfp4",
    16,
    "tensor_group",
    _quantize_nvfp4,
    torch.float8_e4m3fn,
    (Param("weight_global_scale", torch.float32, None), Param("input_global_scale", torch.float32, None, optional=True)),
)
MXFP4 = _float4("mxfp4", 32, "group", _quantize_mxfp4, torch.uint8, ())
