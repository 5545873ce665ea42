"""The weight formats. `FORMATS[name]` is all that there is to know of one; `format_of_scheme` finds one in a compressed-tensors config."""

from collections.abc import Mapping
from typing import Any

from qplugins.formats import fp8
from qplugins.formats.base import CheckpointError, Format, Param
from qplugins.formats.bf16 import BF16
from qplugins.formats.float4 import MXFP4, NVFP4
from qplugins.formats.integer import INT4, INT8, INT8_PLAIN

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        BF16,
        fp8.FP8,
        fp8.FP8_TENSOR,
        fp8.FP8_STATIC,
        fp8.FP8_CHANNEL_STATIC,
        fp8.FP8_A16,
        fp8.FP8_TENSOR_A16,
        *INT8,
        INT8_PLAIN,
        *INT4,
        NVFP4,
        MXFP4,
    )
}
# a family's name stands for its members, of which a layer takes the first that fits its shape
ALIASES: dict[str, tuple[str, ...]] = {"int4": ("int4_g128", "int4_g64", "int4_g32", "int4_channel")}

_WEIGHT_KEYS = ("num_bits", "type", "strategy", "group_size", "symmetric")


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError, naming those there are."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are {', '.join([*ALIASES, *FORMATS])}")
    return FORMATS[name]


def _storage(scheme: Mapping[str, Any]) -> str:
    """How weights of a scheme without a `format` are stored: the rule by which the compressed-tensors library chooses."""
    weights = scheme["weights"]
    if weights.get("type", "int") == "int":
        return "int-quantized" if scheme.get("input_activations") else "pack-quantized"
    if weights.get("num_bits") == 4:
        return "mxfp4-pack-quantized" if weights.get("group_size") == 32 else "nvfp4-pack-quantized"
    return "float-quantized"


def _key(scheme: Mapping[str, Any], storage: str) -> tuple:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, **scheme["weights"]}
    # that library takes -1 for a whole row, and derives the strategy where a config leaves it out
    group = weights.get("group_size")
    weights["strategy"] = weights.get("strategy") or ("channel" if group == -1 else "group" if group else "tensor")
    weights["group_size"] = None if group == -1 else group
    activation = None
    if storage == "float-quantized" and (inputs := scheme.get("input_activations")):
        activation = (inputs.get("num_bits", 8), "token" if inputs.get("dynamic") else inputs.get("strategy", "tensor"))
    return storage, activation, *(weights[key] for key in _WEIGHT_KEYS)


_BY_SCHEME = {_key(f.scheme, f.scheme["format"]): f for f in FORMATS.values() if f.scheme}


def format_of_scheme(scheme: Mapping[str, Any], default_format: str | None = None) -> Format:
    """The format of one entry of `config_groups`.

    default_format  the config's own `format`, which holds for a group that names none
    Activations of fewer bits than the weights' kernels read (NVFP4's 4-bit, INT8's 8-bit) are left in 16 bits: exacter, never coarser.
    Raises ValueError for a scheme that no format here has.
    """
    weights = scheme.get("weights")
    if not weights:
        return BF16
    storage = scheme.get("format") or (default_format if default_format not in (None, "mixed-precision") else None) or _storage(scheme)
    if storage == "naive-quantized":
        storage = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if weights.get("actorder") not in (None, "static", "weight"):
        raise ValueError(
            f"weights with actorder {weights['actorder']!r} keep a weight_g_idx, which is not supported; quantize with actorder 'static'"
        )
    fmt = _BY_SCHEME.get(_key(scheme, storage))
    if fmt is None:
        shown = {k: weights.get(k) for k in _WEIGHT_KEYS}
        raise ValueError(
            f"no format stores {storage} weights with {shown}; supported are {', '.join(f.name for f in FORMATS.values() if f.scheme)}"
        )
    return fmt


__all__ = ["ALIASES", "BF16", "FORMATS", "CheckpointError", "Format", "Param", "format_of_scheme", "get_format"]
