"""The one form in which a quantized matrix travels between checkpoints and kernels.

    W[n, k] = (value(codes[n, k]) - zero_point[n, g]) * scale[n, g] * global_scale,      g = k // group_size

Where groups are of columns that do not lie side by side (GPTQ's act-order), codes are kept in the order of the groups, and `columns` says which
column of W each one is; k above then counts in that order.

Checkpoints differ in how they pack codes; kernels differ in how they want them packed. Both meet here, with one code a byte, so that a
checkpoint layout and a kernel layout never need to know of each other. `dequantize` is the definition that everything is tested against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qplugins.kernels.decode import CODES


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32. uint8 holds e8m0 exponents: 2 ** (byte - 127), 255 is NaN (OCP Microscaling 1.0, 5.4.1)."""
    if scale.dtype == torch.uint8:
        return torch.where(scale == 255, torch.nan, torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.to(torch.int32) - 127))
    return scale.to(torch.float32)


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix of N rows and K columns in codes.

    code          name of the code, a key of `kernels.decode.CODES`
    codes         uint8 [N, K], one code a byte, the 4-bit ones in the low half
    scale         [N, K / group_size]: float32, bfloat16, float16, float8_e4m3fn, or uint8 for e8m0 exponents
    zero_point    int8, the shape of `scale`, in the units of the code's values; None where it is zero throughout
    global_scale  float32 [], a factor of the whole matrix, or [N, 1] where joined matrices had different ones; None where there is none
    columns       int32 [K]: codes[:, k] belong to column columns[k] of W; None where that is k
    """

    code: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = self.scale.shape[1]
        if self.scale.shape[0] != n or groups == 0 or k % groups:
            raise ValueError(f"scale of shape {tuple(self.scale.shape)} does not divide {n} x {k} codes into groups")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero_point has shape {tuple(self.zero_point.shape)}, scale has {tuple(self.scale.shape)}")
        if self.columns is not None and self.columns.shape != (k,):
            raise ValueError(f"columns has shape {tuple(self.columns.shape)}, the matrix has {k} columns")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def group_size(self) -> int:
        """Columns that share a scale; K itself where a row has one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [N, K], by the equation at the top of this file."""
        n, k = self.shape
        w = CODES[self.code].values.to(self.codes.device)[self.codes.to(torch.int32)].view(n, -1, self.group_size)
        if self.zero_point is not None:
            w = w - self.zero_point.to(torch.float32)[..., None]
        w = (w * scale_values(self.scale)[..., None]).view(n, k)
        if self.global_scale is not None:
            w = w * self.global_scale
        return w if self.columns is None else torch.empty_like(w).index_copy_(1, self.columns.to(torch.int64), w)
