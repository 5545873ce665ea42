"""int4 and int8, weight-only: integers with a 16-bit scale a group or a row. compressed-tensors calls it "pack-quantized".

    weight_packed      int32 [N, ceil(K * bits / 32)], offset binary, see packing.py
    weight_scale       [N, K / group], the model's dtype; [N, 1] for one a row
    weight_zero_point  int32 [ceil(N * bits / 32), K / group], asymmetric only: offset binary as the codes are, packed along N
    weight_shape       int64 [2]: N, K
    weight_g_idx       int32 [K], only where groups were made of columns in the order of their importance (act-order, "actorder": "group"):
                       the group of each column. Codes stay in the order of W's columns, scales are in that of the groups.

"int-quantized" stores int8 plainly as `weight` with the same scales; its layers are read here as weight-only too.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.formats.packing import pack_int32, unpack_int32
from qplugins.formats.search import least_squares, quotient
from qplugins.kernels.quantized import QuantizedTensor

TINY = 2.0**-24  # of a group of zeros: float16's smallest, so that no scale is rounded to zero
# Shares of a group's range that are tried. What stands out of a large group is an outlier, which a model has for a reason: clipped by as much as
# its squared error allows, down projections lose more than they gain. What stands out of a small group is just its largest value; and where it is
# known which columns matter, an outlier in one that does is not clipped.
CLIPS = (1.0, 0.95, 0.9)
MORE_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.74, 0.68)


def group_order(group_of: Tensor) -> Tensor:
    """int32 [K]: the columns of W in the order of their groups, from the group of each. Those of one group keep their order."""
    return group_of.argsort(stable=True).to(torch.int32)


def group_index_problem(name: str, group_of: Tensor, k: int, group_size: int | None, permuted: bool) -> str | None:
    """What is wrong with an index that gives each of W's K columns its group, as a sentence; None where nothing is."""
    size = group_size or k
    if permuted:
        counts = group_of.to(torch.int64).clamp(-1, k // size).add(1).bincount(minlength=k // size + 2)[1:]
        wrong = (counts[:-1] != size).nonzero()
        if len(wrong):
            i = int(wrong[0])
            return f"{name}: expected {size} columns in each of the groups 0..{k // size - 1}, found {int(counts[i])} in group {i}"
        return None
    # of a slice, groups count from where it starts
    expected = group_of[0] + torch.arange(k, device=group_of.device) // size
    if not group_of.equal(expected.to(group_of.dtype)):
        first = int((group_of != expected).nonzero()[0])
        return (
            f"{name}: expected groups of {size} neighbouring columns, found column {first} in group {int(group_of[first])}; the columns were "
            "ordered by their importance, and the config does not say so (desc_act)"
        )
    return None


def _quantize(w: Tensor, bits: int, group_size: int | None, symmetric: bool, importance: Tensor | None) -> QuantizedTensor:
    half = 1 << (bits - 1)
    dtype = w.dtype if w.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    clips = MORE_CLIPS if bits == 4 and (importance is not None or (group_size or w.shape[1]) <= 32) else CLIPS

    def candidates(x: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        lo, hi = x.aminmax(dim=-1)
        for clip in clips:
            if symmetric:
                # -half is one step further out than half - 1: either end may bound the scale
                scale = torch.maximum(quotient(hi, half - 1), -lo / half).mul(clip).clamp_min(TINY).to(dtype).to(torch.float32)
                yield scale, torch.zeros_like(scale)
            else:
                scale = (hi.clamp_min(0) - lo.clamp_max(0)).mul(clip / (2 * half - 1)).clamp_min(TINY).to(dtype).to(torch.float32)
                yield scale, (-half - lo.clamp_max(0) * clip / scale).round_().clamp_(-half, half - 1)

    def encode(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (x / scale).round_().add_(zero + half).clamp_(0, 2 * half - 1).to(torch.uint8)

    def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (codes.to(torch.float32) - (zero + half)) * scale

    codes, scale, zero = least_squares(w, group_size or w.shape[1], candidates, encode, decode, importance)
    return QuantizedTensor(f"int{bits}", codes, scale.to(dtype), None if symmetric else zero.to(torch.int8))


def _store(q: QuantizedTensor, bits: int) -> dict[str, Tensor]:
    codes = q.codes
    if q.columns is not None:
        codes = torch.empty_like(codes).index_copy_(1, q.columns.to(torch.int64), codes)
    tensors = {
        "weight_packed": pack_int32(codes, bits),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_point is not None:
        offset = (q.zero_point.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        tensors["weight_zero_point"] = pack_int32(offset, bits, dim=0)
    if q.columns is not None:
        groups = torch.arange(q.shape[1], dtype=torch.int32, device=codes.device) // q.group_size
        tensors["weight_g_idx"] = torch.empty_like(groups).index_copy_(0, q.columns.to(torch.int64), groups)
    return tensors


def _read(tensors: Mapping[str, Tensor], n: int, k: int, bits: int) -> QuantizedTensor:
    zero = None
    if "weight_zero_point" in tensors:
        zero = (unpack_int32(tensors["weight_zero_point"], bits, n, dim=0).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    codes, columns = unpack_int32(tensors["weight_packed"], bits, k), None
    if "weight_g_idx" in tensors:
        columns = group_order(tensors["weight_g_idx"])
        codes = codes.index_select(1, columns)
    return QuantizedTensor(f"int{bits}", codes, tensors["weight_scale"], zero, columns=columns)


def integer(bits: int, group_size: int | None, *, symmetric: bool = True, permuted: bool = False) -> Format:
    per_word = 32 // bits
    params = [Param("weight_packed", torch.int32, (1, per_word)), Param("weight_scale", None, (1, group_size))]
    if not symmetric:
        params.append(Param("weight_zero_point", torch.int32, (per_word, group_size)))
    if permuted:
        params.append(Param("weight_g_idx", torch.int32, (None, 1), axes=(1,)))
    # every reader can do without: K is known from the model
    params.append(Param("weight_shape", torch.int64, None, size=(2,), optional=True))
    weights: dict = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group" if group_size else "channel",
        "symmetric": symmetric,
        "dynamic": False,
    }
    if group_size:
        weights["group_size"] = group_size
    if permuted:
        weights["actorder"] = "group"
    return Format(
        f"int{bits}"
        + (f"_g{group_size}" if group_size else "_channel" if bits == 4 else "")
        + ("" if symmetric else "_asym")
        + ("_act" if permuted else ""),
        params=tuple(params),
        scheme={"format": "pack-quantized", "weights": weights, "input_activations": None},
        code=f"int{bits}",
        group_size=group_size,
        # the order of columns comes from calibration data, which this project's quantizer does not use
        quantize=None if permuted else lambda w, amax=None, importance=None: _quantize(w, bits, group_size, symmetric, importance),
        store=lambda q: _store(q, bits),
        read=lambda tensors, n, k: _read(tensors, n, k, bits),
        problem=lambda tensors, n, k: (
            group_index_problem("weight_g_idx", tensors["weight_g_idx"], k, group_size, permuted) if permuted else None
        ),
        permuted=permuted,
    )


def _read_plain(tensors: Mapping[str, Tensor], n: int, k: int) -> QuantizedTensor:
    return QuantizedTensor(
        "int8", (tensors["weight"].to(torch.int16) + 128).to(torch.uint8), tensors["weight_scale"].expand(n, -1).contiguous()
    )


def _store_plain(q: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": (q.codes.to(torch.int16) - 128).to(torch.int8), "weight_scale": q.scale}


INT4 = tuple(integer(4, g, symmetric=s) for g in (32, 64, 128, None) for s in (True, False))
INT8 = tuple(integer(8, g) for g in (None, 32, 64, 128))
# only read: a column's importance shows in calibration data
ACT_ORDER = tuple(integer(4, g, symmetric=s, permuted=True) for g in (32, 64, 128) for s in (True, False)) + tuple(
    integer(8, g, permuted=True) for g in (32, 64, 128)
)
INT8_PLAIN = Format(
    "int8_plain",
    params=(Param("weight", torch.int8, (1, 1)), Param("weight_scale", None, (1, None))),
    scheme={
        "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
    },
    code="int8",
    quantize=lambda w, amax=None, importance=None: _quantize(w, 8, None, True, importance),
    store=_store_plain,
    read=_read_plain,
)
