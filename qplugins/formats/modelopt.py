"""NVIDIA ModelOpt's layouts, read only. They differ from compressed-tensors' in names, and in which way a global scale goes.

    NVFP4   weight          uint8 [N, K / 2]        two e2m1 codes a byte, the even column in the low half
            weight_scale    float8_e4m3fn [N, K / 16]
            weight_scale_2  float32 []              W = code * weight_scale * weight_scale_2: a factor, where nvfp4 stores a divisor
            input_scale     float32 []              for hardware that multiplies 4-bit activations; not read here

    FP8     weight          float8_e4m3fn [N, K]
            weight_scale    float32 []              of the matrix; with FP8_PER_CHANNEL_PER_TOKEN [N], of the rows
            input_scale     float32 []              FP8 only

The config says one `quant_algo` for all linear layers, or "MIXED_PRECISION" and each one's own under `quantized_layers`. It is found in
hf_quant_config.json, under "quantization", or, since ModelOpt 0.31, as config.json's quantization_config, where the key for what is left alone
is `ignore` and not `exclude_modules`.
"""

import re
from collections.abc import Mapping
from fnmatch import translate
from typing import Any

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.formats.float4 import NVFP4
from qplugins.formats.fp8 import FP8, FP8_STATIC
from qplugins.formats.packing import unpack_pairs
from qplugins.kernels.quantized import QuantizedTensor


def _read_nvfp4(tensors: Mapping[str, Tensor], n: int, k: int) -> QuantizedTensor:
    factor = tensors["weight_scale_2"].to(torch.float32).reshape(())
    return QuantizedTensor("e2m1", unpack_pairs(tensors["weight"]), tensors["weight_scale"], global_scale=factor)


MODELOPT_NVFP4 = Format(
    "modelopt_nvfp4",
    params=(
        Param("weight", torch.uint8, (1, 2)),
        Param("weight_scale", torch.float8_e4m3fn, (1, 16)),
        Param("weight_scale_2", torch.float32, None),
        Param("input_scale", torch.float32, None, optional=True),
    ),
    code="e2m1",
    group_size=16,
    read=_read_nvfp4,
    twin=NVFP4,
)
MODELOPT_FP8 = Format(
    "modelopt_fp8",
    params=(Param("weight", torch.float8_e4m3fn, (1, 1)), Param("weight_scale", None, (1, None), axes=(0,), writes=torch.float32)),
    code="e4m3",
    activation="token",
    read=lambda tensors, n, k: FP8.read(tensors, n, k),
    twin=FP8,
)
MODELOPT = (MODELOPT_NVFP4, MODELOPT_FP8)
ALGORITHMS = {
    "NVFP4": MODELOPT_NVFP4,
    "W4A16_NVFP4": MODELOPT_NVFP4,
    "FP8": FP8_STATIC,  # the very tensors of compressed-tensors
    "FP8_PER_CHANNEL_PER_TOKEN": MODELOPT_FP8,
}


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that says what is quantized how."""
    section = config.get("quantization")
    return section if isinstance(section, Mapping) else config


def _format(of: Mapping[str, Any]) -> Format:
    algorithm = str(of.get("quant_algo")).upper()
    fmt = ALGORITHMS.get(algorithm)
    if fmt is None:
        raise ValueError(f"ModelOpt's quant_algo {algorithm} is not read; those that are: {', '.join(ALGORITHMS)}, MIXED_PRECISION of them")
    if fmt.group_size is not None and of.get("group_size") not in (None, fmt.group_size):
        raise ValueError(f"ModelOpt's {algorithm} has groups of {fmt.group_size} columns; this config has {of['group_size']}")
    return fmt


def _target(pattern: str) -> str:
    """What a name or a shell pattern of a module means: the module, and everything in it. A name may also be the end of a longer one."""
    if any(c in pattern for c in "*?["):
        return f"re:{translate(pattern)}"
    return rf"re:(.*\.)?{re.escape(pattern)}(\..*)?$"


def rules(config: Mapping[str, Any]) -> tuple[list[tuple[str, Format]], list[str]]:
    """(target, format) pairs and ignored targets of a config of ModelOpt's. Raises ValueError for what is not read here."""
    of = settings(config)
    ignored = [_target(p) for p in of.get("exclude_modules") or of.get("ignore") or ()]
    if str(of.get("quant_algo")).upper() != "MIXED_PRECISION":
        return [("Linear", _format(of))], ignored
    layers = of.get("quantized_layers")
    if not layers:
        raise ValueError(
            "quant_algo is MIXED_PRECISION and there are no quantized_layers; where only hf_quant_config.json has them, `qplugins convert` reads it"
        )
    found = []
    for name, layer in layers.items():
        try:
            found.append((_target(name) if "*" in name else name, _format(layer)))
        except ValueError as e:
            raise ValueError(f"quantized_layers, {name}: {e}") from None
    return found, ignored
