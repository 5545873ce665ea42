"""AutoAWQ's layout, "gemm": 4-bit integers with zero points, transposed, and packed along N. Read only; `int4_*_asym` stores the same values.

    qweight  int32 [K, N / 8]        bits 4i .. 4i+3 of word (k, r) hold the code of row 8r + (0, 2, 4, 6, 1, 3, 5, 7)[i], column k
    qzeros   int32 [K / group, N / 8]   zero points, 0 .. 15 as the codes are, in the same order
    scales   float16 [K / group, N]

    W[n, k] = (code - zero) * scale

The order of the eight comes from the kernel that the layout was made for: one mask takes the same four bits of a word's two 16-bit halves,
and these are rows 2j and 2j + 1, side by side. AutoAWQ also names "gemv" and "marlin" layouts, which are others and not read here.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.formats.integer import INT4
from qplugins.formats.packing import unpack_pairs
from qplugins.kernels.quantized import QuantizedTensor

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the code of row 8r + j is


def _unpack(packed: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [N, R]"""
    r, words = packed.shape
    halves = unpack_pairs(packed.contiguous().view(torch.uint8).view(r, -1)).view(r, words, 8)
    return halves[..., PLACES].reshape(r, -1).T.contiguous()


def _read(tensors: Mapping[str, Tensor], n: int, k: int) -> QuantizedTensor:
    zero = (_unpack(tensors["qzeros"]).to(torch.int16) - 8).to(torch.int8)
    return QuantizedTensor("int4", _unpack(tensors["qweight"]), tensors["scales"].T.contiguous(), zero)


def _awq(twin: Format) -> Format:
    g = twin.group_size
    return Format(
        f"awq_{twin.name}",
        params=(
            Param("qweight", torch.int32, (8, 1), axes=(1, 0)),
            Param("qzeros", torch.int32, (8, g), axes=(1, 0)),
            Param("scales", None, (1, g), axes=(1, 0)),
        ),
        code=twin.code,
        group_size=g,
        read=_read,
        twin=twin,
    )


AWQ = tuple(_awq(f) for f in INT4 if f.name.endswith("_asym"))
_BY_GROUP = {f.group_size: f for f in AWQ}


def rules(config: Mapping[str, Any]) -> tuple[list[tuple[str, Format]], list[str]]:
    """(target, format) pairs and ignored targets of a config with quant_method "awq". Raises ValueError for what is not read here.

    `modules_to_not_convert` are parts of names. AutoAWQ quantizes the linear layers of decoder blocks, and never the head.
    """
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("backend", "autoawq") not in ("autoawq", "auto", None):
        raise ValueError(
            f"AWQ's layout {version!r} of {config.get('backend', 'autoawq')} is not read, only 'gemm' of autoawq; save it as that"
        )
    bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits != 4 or not config.get("zero_point", True):
        raise ValueError(f"AWQ stores 4 bits with zero points; this config has bits {bits} and zero_point {config.get('zero_point')}")
    fmt = _BY_GROUP.get(None if group == -1 else group)
    if fmt is None:
        raise ValueError(f"AWQ in groups of {group} is not read; those that are have {', '.join(str(g or -1) for g in _BY_GROUP)}")
    ignored = [f"re:.*{re.escape(part)}" for part in config.get("modules_to_not_convert") or ()]
    return [("Linear", fmt)], [*ignored, "re:.*lm_head$"]
