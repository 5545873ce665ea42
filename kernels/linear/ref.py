"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] in float32, W as in layout.py: the definition, and a form of it that a CPU can serve from.

`matmul` is for reading, and what the kernel's tests compare with. `linear` and `rows` compute the same from the `rows` layout: a 16-bit
word of codes picks its 4 (or 2) values from a table at once, a block of rows at a time, so that no decoded matrix is ever kept.
"""

from functools import cache

import torch
from torch import Tensor

from qplugins.kernels.decode import CODES
from qplugins.kernels.linear.layout import LAYOUTS, named, relative_scale, tile_rows
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.quantized import scale_values

BLOCK = 1 << 18  # values decoded at a time: a megabyte, which stays in a core's cache until the product has read it


def matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 [..., N] from x [..., K], W [N, K] as `QuantizedTensor.dequantize` gives it, bias [N]."""
    y = x.to(torch.float32) @ w.to(torch.float32).T
    return y if bias is None else y + bias.to(torch.float32)


@cache
def _word_values(code: str, device: torch.device) -> Tensor:
    """The bfloat16 values of every 16-bit word, as one integer a word: int64 [65536] for 4-bit codes, int32 for 8-bit ones."""
    bits = CODES[code].bits
    word = torch.arange(1 << 16)
    codes = torch.stack([(word >> shift) & ((1 << bits) - 1) for shift in range(0, 16, bits)], 1)
    # every value of these codes has at most 8 significant bits, which is what bfloat16 has
    values = CODES[code].values[codes].to(torch.bfloat16)
    return values.view(torch.int64 if bits == 4 else torch.int32).view(-1).to(device)


def _decode(spec: Spec, codes: Tensor, row: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """float32 [R, K] of R rows in the `rows` layout. codes int16 [R, W]; row [R]; scale, zero [R, G] or None."""
    # a word is looked up by its unsigned value
    index = codes.reshape(-1).to(torch.int32).bitwise_and_(0xFFFF)
    values = (
        _word_values(spec.code, codes.device)
        .index_select(0, index)
        .view(torch.bfloat16)
        .view(codes.shape[0], codes.shape[1] * 16 // CODES[spec.code].bits)
    )
    w = values[:, : spec.k].to(torch.float32)
    if zero is not None or scale is not None:
        groups = w.view(w.shape[0], spec.k // (spec.group or spec.k), spec.group or spec.k)
        if zero is not None:
            groups -= zero.to(torch.float32)[..., None]
        if scale is not None:
            groups *= scale_values(scale)[..., None]
    return w.mul_(row[:, None])


def _decode_tiles(spec: Spec, t: dict[str, Tensor], index: Tensor) -> Tensor:
    """float32 [R, K] of the rows that `index` (int64 [R]) names in the `tiles` layout."""
    codes, row, scale, zero = tile_rows(spec, t, index)
    w = (
        CODES[spec.code]
        .values.to(codes.device)[codes.to(torch.int32)]
        .view(len(index), spec.k // (spec.group or spec.k), spec.group or spec.k)
    )
    if zero is not None:
        w = w - zero.to(torch.float32)[..., None]
    if scale is not None:
        w = w * relative_scale(spec, scale)[..., None]
    return w.view(len(index), spec.k) * row[:, None]


def rows(implementation: str, spec: Spec, tensors: list[Tensor] | tuple[Tensor, ...], index: Tensor | slice) -> Tensor:
    """float32 [R, K]: the rows of W that `index` (int64 [R] or a slice) names, from any layout."""
    t = named(implementation, spec, tensors)
    layout = "plain" if spec.code is None else LAYOUTS[implementation]
    if layout == "plain":
        return t["weight"][index].to(torch.float32)
    if layout == "fp8":
        return t["weight"].view(torch.uint8)[index].view(torch.float8_e4m3fn).to(torch.float32) * t["scale"].expand(spec.n)[index][:, None]
    if layout == "tiles":
        return _decode_tiles(spec, t, torch.arange(spec.n, device=t["codes"].device)[index])
    return _decode(spec, t["codes"][index], t["row"][index], *(t[name][index] if name in t else None for name in ("scale", "zero")))


def linear(x: Tensor, implementation: str, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias for one shard, in float32 up to the rounding to out's dtype."""
    x = x.to(torch.float32)
    step = max(1, BLOCK // spec.k)
    for start in range(0, spec.n, step):
        block = slice(start, min(start + step, spec.n))
        out[:, block] = matmul(x, rows(implementation, spec, tensors, block), None if bias is None else bias[block])
