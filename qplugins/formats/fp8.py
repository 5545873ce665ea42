"""fp8: e4m3 codes with a float32 scale a row, or one for the matrix. compressed-tensors calls it "float-quantized".

    weight        float8_e4m3fn [N, K]
    weight_scale  float32 [N, 1], or [1] for the whole matrix
    input_scale   float32 [1], where the activation's scale is fixed: x is stored as x / input_scale

Scales come from the largest magnitude: e4m3's own exponent makes its relative error the same everywhere, so clipping gains nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.formats.search import quotient
from qplugins.kernels.decode.e4m3 import MAX
from qplugins.kernels.quantized import QuantizedTensor

TINY = 1e-12  # of a row of zeros


def _quantize(w: Tensor, per_row: bool, amax: Tensor | None) -> QuantizedTensor:
    w = w.to(torch.float32)
    if per_row:
        largest = w.abs().amax(1, keepdim=True)
    else:
        largest = (w.abs().amax() if amax is None else amax.to(w)).expand(w.shape[0], 1)
    scale = quotient(largest.clamp_min(TINY), MAX).contiguous()
    codes = (w / scale).clamp_(-MAX, MAX).to(torch.float8_e4m3fn)
    return QuantizedTensor("e4m3", codes.view(torch.uint8), scale)


def _store(q: QuantizedTensor, per_row: bool) -> dict[str, Tensor]:
    return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": q.scale if per_row else q.scale[:1, 0].clone()}


def _read(tensors: Mapping[str, Tensor], n: int, k: int) -> QuantizedTensor:
    scale = tensors["weight_scale"].to(torch.float32).reshape(-1, 1).expand(n, 1).contiguous()
    return QuantizedTensor("e4m3", tensors["weight"].view(torch.uint8), scale)


def _fp8(name: str, *, per_row: bool, activation: str | None) -> Format:
    params = [
        Param("weight", torch.float8_e4m3fn, (1, 1)),
        Param("weight_scale", None, (1, None) if per_row else None, writes=torch.float32),
    ]
    if activation == "tensor":
        params.append(Param("input_scale", None, None))
    weights = {"num_bits": 8, "type": "float", "strategy": "channel" if per_row else "tensor", "symmetric": True, "dynamic": False}
    inputs = {
        None: None,
        "token": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
        "tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
    }[activation]
    return Format(
        name,
        params=tuple(params),
        scheme={"format": "float-quantized", "weights": weights, "input_activations": inputs},
        code="e4m3",
        activation=activation,
        # a fixed input scale comes from calibration data, which this project's quantizer does not use: such layers are read, not made
        # its scales follow from the largest magnitudes, whatever is important
        quantize=None if activation == "tensor" else lambda w, amax=None, importance=None: _quantize(w, per_row, amax),
        store=lambda q: _store(q, per_row),
        read=_read,
    )


FP8 = _fp8("fp8", per_row=True, activation="token")
FP8_TENSOR = _fp8("fp8_tensor", per_row=False, activation="token")
FP8_STATIC = _fp8("fp8_static", per_row=False, activation="tensor")
FP8_CHANNEL_STATIC = _fp8("fp8_channel_static", per_row=True, activation="tensor")
FP8_A16 = _fp8("fp8_a16", per_row=True, activation=None)
FP8_TENSOR_A16 = _fp8("fp8_tensor_a16", per_row=False, activation=None)
