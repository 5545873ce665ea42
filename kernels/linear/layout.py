"""How a quantized matrix lies in memory for `qplugins::linear`, as formulas, each with its inverse.

Every layout holds the same equation,

    W[n, k] = (value(codes[n, k]) - zero[n, g]) * scale[n, g] * row[n],      g = k // group

with `row` in float32, applied to the finished sum, and `scale` and `zero` only where a row has several groups. Two arrangements of it:

**rows**: what the reference reads, on any device: a row is contiguous, and padded to whole 16-bit words of 4 or 2 codes

    bits b*(k % s) .. b*(k % s) + b - 1 of word codes[n, k // s] hold code k       b bits a code, s = 16 // b

**tiles**: what the Triton kernel reads. The tensor core's first operand wants, from each lane of a warp, pairs of neighbouring columns of two
rows eight apart. So the matrix is cut into tiles of 64 rows by 16 columns of 16-bit words, and a word holds the codes of the same row in 4
(or 2, for 8-bit codes) neighbouring spans of 16 columns: 64 rows x 64 columns of 4-bit codes, or 64 x 32 of 8-bit ones, make a tile of 2 KiB.
Inside it each of 128 threads finds its eight words in 16 consecutive bytes, decodes them where they are, and has the operand in its registers:

    word (r, c) of a tile stands at      w*256 + g*32 + t*8 + h*4 + u*2 + p       r = 16w + 8u + g,  c = 8h + 2t + p
                                         (w < 4 warps, g < 8, t < 4; h, u, p < 2)
    words[n // 64, q, that]              holds columns 16*(q*S + j) + c,  j < S = 16 // bits

`decode/` says which bits of the word hold code j: chosen so that few instructions turn two words into two 16-bit floats. N and K are padded to
whole tiles. What groups have (scales, zero points as int16) lies group by group, and one integer holds it for the rows n and n + 8, which
the same thread owns, and for all groups of a tile: 64 bits for NVFP4 (2 rows x 4 groups of 8 bits), 32 for one 16-bit scale.

Scales are stored so that fp16 can hold them as well as bf16, and that decoding one is a shift and an addition:

    e4m3              as 5 exponent and 3 mantissa bits without a sign, nothing subnormal: 2 ** (E - 10) * (1 + m / 8)
    e8m0              relative to the row's largest, which is 127; what lies 2 ** -127 below that is zero
    bf16, fp16, f32   divided by a power of two, so that the row's largest is in [1, 2)

and the power of two that a row lost is in `row`. A matrix whose groups are of columns that do not lie side by side is stored in the order of
its groups, and `columns` says which column of x meets each of its own; `op` applies it. `locks` holds zeros between calls: programs that
share a tile's K count their arrivals in it.

Packed checkpoints hold tiles too. Whoever moves a bit of them raises the version in `qplugins/formats/tiles.py`, so that those are refused.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from qplugins.kernels.decode import CODES, Code
from qplugins.kernels.linear.spec import SCALES, Spec, spec_of
from qplugins.kernels.quantized import QuantizedTensor, scale_values

LAYOUTS = {"reference": "rows", "triton": "tiles", "scaled_mm": "fp8", "torch": "plain"}  # what an implementation reads


TILE_N = 64  # rows of a tile
LOCKS = 4  # a tile of rows may be shared out over K in so many blocks of x's rows at the same time


@dataclass(frozen=True)
class Weight:
    """A matrix in the layout of the implementation that is to run it. `tensors` go to the operator in this order."""

    implementation: str
    spec: Spec
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


@cache
def tensor_names(implementation: str, spec: Spec) -> tuple[str, ...]:
    """What `Weight.tensors` holds, in order. Raises ValueError for an implementation that there is none of."""
    layout = LAYOUTS.get(implementation)
    if layout is None:
        raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(LAYOUTS)}")
    if spec.permuted:
        return (*tensor_names(implementation, replace(spec, permuted=False)), "columns")
    if layout == "plain" or spec.code is None:
        return ("weight",)
    if layout == "fp8":
        return ("weight", "scale", "input_scale") if spec.activation == "tensor" else ("weight", "scale")
    names = ["codes", "row", "locks"] if layout == "tiles" else ["codes", "row"]
    if spec.group is not None:
        names.append("scale")
    if spec.zero_point:
        names.append("zero")
    if spec.activation == "tensor":
        names.append("input_scale")
    return tuple(names)


def named(implementation: str, spec: Spec, tensors: tuple[Tensor, ...] | list[Tensor]) -> dict[str, Tensor]:
    """`Weight.tensors` by name. Raises ValueError where their number is wrong."""
    names = tensor_names(implementation, spec)
    if len(names) != len(tensors):
        raise ValueError(f"{implementation} {spec} has the tensors {', '.join(names)}; {len(tensors)} were given")
    return dict(zip(names, tensors, strict=True))


def pack(
    q: QuantizedTensor | Tensor | Weight,
    implementation: str = "triton",
    *,
    activation: str | None = None,
    input_scale: Tensor | None = None,
) -> Weight:
    """A matrix as `implementation` reads it, on the device where it is.

    q            a quantized matrix, also one that is packed already; or a 16- or 32-bit float one [N, K], which only "torch" and "reference" run
    activation   see Spec
    input_scale  float32 [1] or [], with activation "tensor"
    """
    if isinstance(q, Weight):
        if q.implementation == implementation:
            return q
        q = unpack(q)
    if isinstance(q, Tensor):
        if implementation not in ("torch", "reference"):
            raise ValueError(f"{implementation} runs quantized matrices; this one is {q.dtype}")
        return Weight(implementation, spec_of(q), (q.contiguous(),))
    spec = spec_of(q, activation)
    if (activation == "tensor") != (input_scale is not None):
        raise ValueError(f"an input_scale belongs to activation 'tensor' and to no other; activation is {activation!r}")
    layout = LAYOUTS[implementation]
    if layout == "fp8":
        tensors = _pack_fp8(q, activation)
    elif layout == "rows":
        tensors = _pack_rows(q)
    elif layout == "tiles":
        tensors = _pack_tiles(q)
    else:
        raise ValueError(f"{implementation} runs a matrix that is not quantized; this is {spec}")
    if input_scale is not None:
        tensors.append(input_scale.to(q.codes.device, torch.float32).reshape(1))
    if q.columns is not None:
        tensors.append(q.columns)
    return Weight(implementation, spec, tuple(tensors))


def unpack(w: Weight) -> QuantizedTensor:
    """The inverse of `pack`: the same codes, scales, zero points and global scale."""
    if w.spec.code is None:
        raise ValueError("the matrix is not quantized")
    layout, t = LAYOUTS[w.implementation], named(w.implementation, w.spec, w.tensors)
    if layout == "fp8":
        return QuantizedTensor(
            "e4m3", t["weight"].view(torch.uint8), t["scale"].reshape(-1, 1).expand(w.spec.n, 1).to(SCALES[w.spec.scale])
        )
    return replace({"rows": _unpack_rows, "tiles": _unpack_tiles}[layout](w.spec, t), columns=t.get("columns"))


def _row_factor(q: QuantizedTensor) -> Tensor:
    """float32 [N]: the global scale, and the scale where a row has but one."""
    n, _ = q.shape
    row = torch.ones(n, dtype=torch.float32, device=q.codes.device)
    if q.scale.shape[1] == 1:
        row = row * scale_values(q.scale[:, 0])
    return row if q.global_scale is None else row * q.global_scale.to(row)


def _unscale(spec: Spec, row: Tensor, scale: Tensor | None, codes: Tensor, zero: Tensor | None) -> QuantizedTensor:
    """A QuantizedTensor of codes and zero points, from the scales as stored in `rows`."""
    if scale is None:
        if spec.scale == "e4m3":
            # an e4m3 scale a row and a global one have been multiplied; float32 holds the product
            return QuantizedTensor(spec.code, codes, row[:, None], zero)
        if spec.scale == "e8m0":
            return QuantizedTensor(spec.code, codes, (torch.log2(row) + 127).round().to(torch.uint8)[:, None], zero)
        return QuantizedTensor(spec.code, codes, row[:, None].to(SCALES[spec.scale]), zero)
    if spec.scale != "e4m3":
        return QuantizedTensor(spec.code, codes, scale, zero)
    # matrices that were fused may have had different ones
    return QuantizedTensor(spec.code, codes, scale, zero, row[0] if bool((row == row[0]).all()) else row[:, None])


def _pack_rows(q: QuantizedTensor) -> list[Tensor]:
    n, k = q.shape
    per_word = 16 // spec_of(q).bits
    codes = torch.nn.functional.pad(q.codes, (0, -k % per_word))
    if per_word == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    tensors = [codes.contiguous().view(torch.int16), _row_factor(q)]
    if q.scale.shape[1] > 1:
        tensors.append(q.scale.contiguous())
    if q.zero_point is not None:
        tensors.append(q.zero_point.contiguous())
    return tensors


def _unpack_rows(spec: Spec, t: dict[str, Tensor]) -> QuantizedTensor:
    codes = t["codes"].view(torch.uint8)
    if spec.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return _unscale(spec, t["row"], t.get("scale"), codes[:, : spec.k].contiguous(), t.get("zero"))


def _pack_fp8(q: QuantizedTensor, activation: str | None) -> list[Tensor]:
    """e4m3 [N, K] as it is, and a scale: float32 [N], or [1] where x and W have one each, which is the quicker product."""
    row = _row_factor(q)
    if q.code != "e4m3" or q.scale.shape[1] != 1:
        raise ValueError(f"scaled_mm runs e4m3 weights with a scale a row or one a matrix; this is {spec_of(q)}")
    one = activation == "tensor" and bool((row == row[:1]).all())
    return [q.codes.view(torch.float8_e4m3fn).contiguous(), row[:1].clone() if one else row]


def fuse(weights: list[Weight]) -> list[Weight]:
    """Neighbours that one call can run as one matrix, joined along N: fewer, larger products. The output's columns stay where they are."""
    joined: list[Weight] = []
    for w in weights:
        if joined and _joins(joined[-1], w):
            joined[-1] = _join(joined[-1], w)
        else:
            joined.append(w)
    return joined


def _joins(a: Weight, b: Weight) -> bool:
    same = a.implementation == b.implementation and replace(a.spec, n=b.spec.n) == b.spec and a.spec.activation != "tensor"
    if same and a.spec.permuted:  # one x for both; siblings of one layer have the same order, since it comes from their input
        same = a.tensors[-1].equal(b.tensors[-1])
    return same and (LAYOUTS[a.implementation] != "tiles" or a.spec.n % TILE_N == 0) and a.tensors[0].dtype == b.tensors[0].dtype


def _join(a: Weight, b: Weight) -> Weight:
    spec = replace(a.spec, n=a.spec.n + b.spec.n)
    names = tensor_names(a.implementation, a.spec)
    tensors = []
    for name, s, t in zip(names, a.tensors, b.tensors, strict=True):
        if name == "columns":
            tensors.append(s)
            continue
        dim = 1 if LAYOUTS[a.implementation] == "tiles" and name in ("scale", "zero") else 0
        tensors.append(torch.cat((s, t), dim))
    return Weight(a.implementation, spec, tuple(tensors))


def _join_words(code: Code, codes: Tensor) -> Tensor:
    """uint8 [..., S, 16] -> int16 [..., 16]: bit b of code j goes to bit `code.places[j][b]` of the word."""
    word = torch.zeros(codes.shape[:-2] + codes.shape[-1:], dtype=torch.int32, device=codes.device)
    for j, places in enumerate(code.places):
        for b, place in enumerate(places):
            word |= ((codes[..., j, :].to(torch.int32) >> b) & 1) << place
    return torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16)


def _split_words(code: Code, words: Tensor) -> Tensor:
    """The inverse of `_join_words`."""
    word = words.to(torch.int32)
    codes = [sum(((word >> place) & 1) << b for b, place in enumerate(places)) for places in code.places]
    return torch.stack(codes, -2).to(torch.uint8)


def tile_k(spec: Spec) -> int:
    """Columns of a tile."""
    return 256 // spec.bits


def scales_per_tile(spec: Spec) -> int:
    """Scales that a row has within a tile."""
    return 1 if spec.group is None else max(1, tile_k(spec) // spec.group)


def _pack_tiles(q: QuantizedTensor) -> list[Tensor]:
    spec = spec_of(q)
    n, k = q.shape
    codes, row, scale = q.codes, _row_factor(q), None
    if spec.group is not None:
        codes, row, scale = _kernel_scales(q, row)
    pad = torch.nn.functional.pad(codes, (0, -k % tile_k(spec), 0, -n % TILE_N))
    tiles_n, tiles_k = pad.shape[0] // TILE_N, pad.shape[1] // tile_k(spec)
    # rows 16w + 8u + g, columns 16j + c; then c = 8h + 2t + p
    words = _join_words(CODES[spec.code], pad.view(tiles_n, TILE_N, tiles_k, -1, 16))
    words = words.view(tiles_n, 4, 2, 8, tiles_k, 2, 4, 2).permute(0, 4, 1, 3, 6, 5, 2, 7)
    locks = torch.zeros(tiles_n * LOCKS, dtype=torch.int32, device=q.codes.device)
    tensors = [words.reshape(tiles_n, tiles_k, 1024), row, locks]
    if scale is not None:
        tensors.append(_group_words(spec, scale))
    if q.zero_point is not None:
        tensors.append(_group_words(spec, q.zero_point.to(torch.int16)))
    return tensors


def tile_rows(spec: Spec, t: dict[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The rows that `index` (int64 [R]) names: codes uint8 [R, K], row float32 [R], and scale and zero [R, G] as they are stored, or None."""
    tiles_n, tiles_k, _ = t["codes"].shape
    w, u, g = index // 16 % 4, index // 8 % 2, index % 8
    # [tile, q, w, g, t, h, u, p] -> [row, q, t, h, p] -> columns c = 8h + 2t + p
    words = t["codes"].view(tiles_n, tiles_k, 4, 8, 4, 2, 2, 2)[index // TILE_N, :, w, g, :, :, u, :]
    words = words.permute(0, 1, 3, 2, 4).reshape(-1, tiles_k, 16)
    codes = _split_words(CODES[spec.code], words).reshape(len(index), tiles_k * tile_k(spec))[:, : spec.k]

    def of_groups(name: str, dtype: torch.dtype) -> Tensor | None:
        if name not in t:
            return None
        pairs = t[name].view(INTEGERS[dtype.itemsize]).view(t[name].shape[0], -1, 8, 2, scales_per_tile(spec))[:, index // 16, g, u]
        return (
            pairs.permute(1, 0, 2)
            .reshape(len(index), pairs.shape[0] * pairs.shape[2])[:, : spec.k // (spec.group or spec.k)]
            .contiguous()
            .view(dtype)
        )

    scale_dtype = torch.uint8 if spec.scale in ("e4m3", "e8m0") else SCALES[spec.scale]
    return codes, t["row"][index], of_groups("scale", scale_dtype), of_groups("zero", torch.int16)


def relative_scale(spec: Spec, scale: Tensor) -> Tensor:
    """float32: the scales that `tile_rows` returns, which `row` is a factor of."""
    if spec.scale == "e4m3":
        return _e4m3_from_e5m3(scale).to(torch.float32)
    return scale_values(scale)


def _unpack_tiles(spec: Spec, t: dict[str, Tensor]) -> QuantizedTensor:
    codes, row, scale, zero = tile_rows(spec, t, torch.arange(spec.n, device=t["codes"].device))
    codes, zero = codes.contiguous(), None if zero is None else zero.to(torch.int8)
    if scale is None:
        return _unscale(spec, row, None, codes, zero)
    if spec.scale == "e4m3":
        scale = _e4m3_from_e5m3(scale)
    elif spec.scale == "e8m0":
        scale = (scale.to(torch.int32) + torch.frexp(row).exponent[:, None] - 1).clamp(0, 254).to(torch.uint8)
    else:
        scale = (scale.to(torch.float32) * row[:, None]).to(scale.dtype)
    return _unscale(spec, row, scale, codes, zero)


def _kernel_scales(q: QuantizedTensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, row, scale) with the scales as the kernel reads them. Raises ValueError where a scale is negative or NaN."""
    if q.scale.dtype == torch.float8_e4m3fn:
        byte = q.scale.view(torch.uint8)
        if bool((byte >= 0x7F).any()):
            raise ValueError("an e4m3 scale of the weight is negative or NaN")
        # a scale of zero reads as a small number in the kernel, so its group's values are made zero too
        nought = torch.full_like(byte, int((CODES[q.code].values == 0).nonzero()[0]))
        if q.zero_point is not None:
            nought += q.zero_point.view(torch.uint8)
        nought, zero = (t.repeat_interleave(q.group_size, 1) for t in (nought, byte == 0))
        return torch.where(zero, nought, q.codes), row, _e5m3_from_e4m3(byte)
    if q.scale.dtype == torch.uint8:
        if bool((q.scale == 255).any()):
            raise ValueError("an e8m0 scale of the weight is NaN")
        largest = q.scale.to(torch.int32).amax(1, keepdim=True)
        row = row * torch.ldexp(torch.ones_like(row), largest[:, 0] - 127)
        return q.codes, row, (q.scale.to(torch.int32) - largest + 127).clamp_min(0).to(torch.uint8)
    scale = q.scale.to(torch.float32)
    largest = scale.abs().amax(1)
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    power = torch.where(largest > 0, power, 1)
    return q.codes, row * power, (scale / power[:, None]).to(q.scale.dtype)


def _e5m3_from_e4m3(byte: Tensor) -> Tensor:
    """uint8 -> uint8: unsigned, 5 exponent bits, 3 mantissa bits, 2 ** (E - 10) * (1 + m / 8), nothing subnormal; 0 is zero.

    Every positive e4m3 number has one; its bits are those of a 16-bit float but for a constant in the exponent.
    """
    value = byte.view(torch.float8_e4m3fn).to(torch.float32)
    mantissa, exponent = torch.frexp(value)  # value = mantissa * 2 ** exponent, mantissa in [1/2, 1)
    coded = ((exponent + 9) * 8 + (mantissa * 16).to(torch.int32) - 8).to(torch.uint8)
    return torch.where(byte == 0, 0, coded)


def _e4m3_from_e5m3(byte: Tensor) -> Tensor:
    b = byte.to(torch.int32)
    value = torch.ldexp(1 + (b & 7) / 8, (b >> 3) - 10)
    return torch.where(b == 0, 0.0, value).to(torch.float8_e4m3fn)


def _group_words(spec: Spec, scale: Tensor) -> Tensor:
    """[N, G] -> integers [G / s, N' / 2], N' whole tiles. An integer holds what rows n and n + 8 have for a tile's s groups, low bits first."""
    per_tile = scales_per_tile(spec)
    size = scale.element_size()
    if size * per_tile > 4:
        raise ValueError(f"the scales of two rows do not fit 64 bits: {spec} has {per_tile} of {8 * size} bits in a tile")
    padded = torch.nn.functional.pad(scale.view(INTEGERS[size]), (0, -scale.shape[1] % per_tile, 0, -scale.shape[0] % TILE_N))
    words = padded.contiguous().view(INTEGERS[size * per_tile])
    pairs = words.view(-1, 2, 8, words.shape[1]).permute(3, 0, 2, 1).contiguous()
    return pairs.view(INTEGERS[size * per_tile * 2]).reshape(words.shape[1], -1)


# by their bytes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def scale_word_bits(spec: Spec, zero: bool = False) -> int:
    """Bits of the integers that hold a tile's scales (or zero points) of two rows."""
    size = 2 if zero else SCALES[spec.scale].itemsize
    return 16 * size * scales_per_tile(spec)
