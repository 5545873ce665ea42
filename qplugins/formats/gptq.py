"""GPTQ's layout, of AutoGPTQ and GPTQModel: integers, transposed, packed along K. Read only; `int4_*` and `int8_*` store the same values.

    qweight  int32 [K * bits / 32, N]            bits b*j .. b*j+b-1 of word (r, n) hold the code of row n, column (32/b) * r + j
    qzeros   int32 [K / group, N * bits / 32]    bits b*j .. b*j+b-1 of word (g, r) hold the zero point of row (32/b) * r + j, less one
    scales   float16 [K / group, N]
    g_idx    int32 [K]                           the group of each column

    W[n, k] = (code - zero) * scale

"Less one" is subtracted from whole words, so that a zero point of 0 borrows from the one above it, and adding one to whole words gives all
back. `"checkpoint_format": "gptq_v2"` stores zero points as they are. Where the config says `sym`, they are the middle, 8 or 128, throughout.

g_idx counts 0, 0, .., 1, 1, .. unless the quantizer took columns in the order of their importance (`desc_act`, act-order) and made its groups
in that order: then a group's columns are anywhere. `static_groups` makes the groups beforehand, of neighbours, whatever the order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.formats.integer import ACT_ORDER, INT4, INT8, group_index_problem, group_order
from qplugins.formats.packing import unpack_int32
from qplugins.kernels.quantized import QuantizedTensor

LAYOUTS = {"gptq": 1, "gptq_v2": 0}  # a checkpoint_format -> what its zero points lack
ONES = {4: 0x11111111, 8: 0x01010101}


def _zero_points(qzeros: Tensor, bits: int, n: int, less: int) -> Tensor:
    """uint8 [N, K / group]"""
    return unpack_int32(qzeros + less * ONES[bits], bits, n).T.contiguous()


def _read(tensors: Mapping[str, Tensor], n: int, k: int, twin: Format, less: int) -> QuantizedTensor:
    bits, zero, columns = int(twin.code.removeprefix("int")), None, None
    if not twin.scheme["weights"]["symmetric"]:
        zero = (_zero_points(tensors["qzeros"], bits, n, less).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    codes = unpack_int32(tensors["qweight"].T.contiguous(), bits, k)
    if twin.permuted:
        columns = group_order(tensors["g_idx"])
        codes = codes.index_select(1, columns)
    return QuantizedTensor(twin.code, codes, tensors["scales"].T.contiguous(), zero, columns=columns)


def _problem(tensors: Mapping[str, Tensor], n: int, k: int, twin: Format) -> str | None:
    bits = int(twin.code.removeprefix("int"))
    if twin.scheme["weights"]["symmetric"]:
        middle = _zero_points(tensors["qzeros"], bits, n, 0)
        # either version: whether they lack one makes no difference to a reader that knows them to be the middle
        if not any(bool((middle == (1 << (bits - 1)) - less).all()) for less in LAYOUTS.values()):
            return f"qzeros: expected {1 << (bits - 1)} throughout, since the config says sym, found others"
    if "g_idx" in tensors:
        return group_index_problem("g_idx", tensors["g_idx"], k, twin.group_size, twin.permuted)
    return None


def _gptq(twin: Format, layout: str) -> Format:
    g, per_word = twin.group_size, 32 // int(twin.code.removeprefix("int"))
    return Format(
        f"{layout}_{twin.name}",
        params=(
            Param("qweight", torch.int32, (1, per_word), axes=(1, 0)),
            Param("qzeros", torch.int32, (per_word, g), axes=(1, 0)),
            Param("scales", None, (1, g), axes=(1, 0)),
            # neighbours need no index
            Param("g_idx", torch.int32, (None, 1), axes=(1,), optional=not twin.permuted),
        ),
        code=twin.code,
        group_size=g,
        read=lambda tensors, n, k: _read(tensors, n, k, twin, LAYOUTS[layout]),
        problem=lambda tensors, n, k: _problem(tensors, n, k, twin),
        twin=twin,
        permuted=twin.permuted,
    )


TWINS = (*INT4, *INT8, *ACT_ORDER)
GPTQ = tuple(_gptq(f, layout) for f in TWINS for layout in LAYOUTS)
_BY_NAME = {f.name: f for f in GPTQ}
# (bits, group size, symmetric, permuted) -> the format of those values
_TWINS = {(int(f.code[3:]), f.group_size, f.scheme["weights"]["symmetric"], f.permuted): f for f in TWINS}


def _format(config: Mapping[str, Any]) -> Format:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in LAYOUTS:
        raise ValueError(f"GPTQ's checkpoint_format {layout!r} is not read, only {' and '.join(LAYOUTS)}; save it as one of those")
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"GPTQ with pack_dtype {config['pack_dtype']} is not read, only int32")
    bits, size, symmetric = config.get("bits"), config.get("group_size"), config.get("sym", True)
    group = None if size == -1 else size
    # a group of all columns, and groups made beforehand, are the same in any order
    permuted = bool(config.get("desc_act")) and group is not None and not config.get("static_groups")
    twin = _TWINS.get((bits, group, symmetric, permuted))
    if twin is None:
        found = f"bits {bits}, group_size {size}, sym {symmetric}"
        raise ValueError(f"GPTQ with {found} is not read; read are 4 bits, and 8 with sym, in groups of 32, 64, 128 or -1, the whole row")
    return _BY_NAME[f"{layout}_{twin.name}"]


def rules(config: Mapping[str, Any]) -> tuple[list[tuple[str, Format]], list[str]]:
    """(target, format) pairs and ignored targets of a config with quant_method "gptq". Raises ValueError for what is not read here.

    GPTQModel's `dynamic` is a list of expressions, of which the first that matches the start of a name decides: one that begins with "-:"
    leaves the module alone, another ("+:" or without a sign) gives it other bits, group_size, sym or desc_act.
    """
    found, ignored, before = [], [], []
    for key, values in (config.get("dynamic") or {}).items():
        expression = key.removeprefix("+:").removeprefix("-:")
        if key.startswith("-:"):
            # ignored targets go before all rules here, and there only before those that follow
            unless = f"(?!{'|'.join(f'(?:{e})' for e in before)})" if before else ""
            ignored.append(f"re:{unless}(?:{expression})")
        else:
            try:
                found.append((f"re:{expression}", _format({**config, **values})))
            except ValueError as e:
                raise ValueError(f"dynamic, {key!r}: {e}") from None
            before.append(expression)
    if not config.get("lm_head"):
        ignored.append("re:.*lm_head$")
    return [*found, ("Linear", _format(config))], ignored
