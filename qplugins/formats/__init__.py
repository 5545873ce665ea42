"""The weight formats. `FORMATS[name]` is all that there is to know of one; `format_of_scheme` finds one in a compressed-tensors config, and
`PRODUCERS` those of other tools' configs, whose layouts are formats that are only read (`FOREIGN`). `TILES` are the kernel's own layout."""

from collections.abc import Callable, Mapping
from typing import Any

from qplugins.formats import awq, fp8, gptq, modelopt, tiles
from qplugins.formats.base import CheckpointError, Format, Param
from qplugins.formats.bf16 import BF16
from qplugins.formats.float4 import MXFP4, NVFP4
from qplugins.formats.integer import ACT_ORDER, INT4, INT8, INT8_PLAIN

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
FOREIGN: dict[str, Format] = {f.name: f for f in (*ACT_ORDER, *awq.AWQ, *gptq.GPTQ, *modelopt.MODELOPT)}
"""Found in checkpoints, and in no layer map: this project does not make them."""
TILES: dict[str, Format] = {f.name: f for f in tiles.in_tiles((*FORMATS.values(), *ACT_ORDER))}
"""Found in packed checkpoints, and in no layer map: packing is a choice for a whole checkpoint."""

PRODUCERS: dict[str, Callable[[Mapping[str, Any]], tuple[list[tuple[str, Format]], list[str]]]] = {
    "awq": awq.rules,
    "gptq": gptq.rules,
    "modelopt": modelopt.rules,
}
"""quant_method -> (target, format) pairs, the first that matches deciding, and ignored targets, of a config with that quant_method."""

# a family's name stands for its members, of which a layer takes the first that fits its shape
ALIASES: dict[str, tuple[str, ...]] = {"int4": ("int4_g128", "int4_g64", "int4_g32", "int4_channel")}

_WEIGHT_KEYS = ("num_bits", "type", "strategy", "group_size", "symmetric", "actorder")
# "static" and "weight" say how scales were found, and leave groups as they are
_ACTORDER = {None: None, False: None, "static": None, "weight": None, "group": "group", "dynamic": "group", True: "group"}


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError, naming those there are."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are {', '.join([*ALIASES, *FORMATS])}")
    return FORMATS[name]


def any_format(name: str) -> Format:
    """The format of that name, also one that is found in checkpoints only."""
    return FORMATS.get(name) or FOREIGN.get(name) or TILES[name]


_IN_TILES = {f.twin: f for f in TILES.values()}


def packed(fmt: Format, n: int, k: int) -> Format:
    """What an n x k matrix in that format is packed as: the same in tiles, or what it is where they cannot hold it."""
    tiled = _IN_TILES.get(fmt)
    return tiled if tiled is not None and tiled.refuses(n, k) is None else fmt


def producer(config: Mapping[str, Any]) -> str:
    """Whose config it is, by its quant_method: a key of PRODUCERS, "compressed-tensors", or whatever else it says.

    Both engines tell ModelOpt's algorithms apart by names of their own (modelopt_fp4, modelopt_mixed), which they write into the config.
    """
    name = str(config.get("quant_method") or "")
    by_modelopt = (config.get("producer") or {}).get("name") == "modelopt" or "quant_algo" in modelopt.settings(config)
    return "modelopt" if by_modelopt or name.startswith("modelopt") else name


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
    weights["actorder"] = _ACTORDER.get(weights.get("actorder"), weights.get("actorder"))
    activation = None
    if storage == "float-quantized" and (inputs := scheme.get("input_activations")):
        activation = (inputs.get("num_bits", 8), "token" if inputs.get("dynamic") else inputs.get("strategy", "tensor"))
    return storage, activation, *(weights[key] for key in _WEIGHT_KEYS)


_BY_SCHEME = {_key(f.scheme, f.scheme["format"]): f for f in (*FORMATS.values(), *FOREIGN.values(), *TILES.values()) if f.scheme}


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
    fmt = _BY_SCHEME.get(_key(scheme, storage))
    if fmt is None:
        if reason := tiles.refuses(storage):
            raise ValueError(reason)
        shown = {k: weights.get(k) for k in _WEIGHT_KEYS}
        raise ValueError(
            f"no format stores {storage} weights with {shown}; supported are {', '.join(f.name for f in FORMATS.values() if f.scheme)}"
        )
    return fmt


__all__ = [
    "ALIASES",
    "BF16",
    "FOREIGN",
    "FORMATS",
    "PRODUCERS",
    "TILES",
    "CheckpointError",
    "Format",
    "Param",
    "any_format",
    "format_of_scheme",
    "get_format",
    "packed",
    "producer",
]
