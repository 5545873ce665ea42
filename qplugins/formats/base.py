"""A weight format, as data: which tensors a layer of it stores, and the way from a matrix to those tensors and back.

    matrix --quantize--> QuantizedTensor --store--> {"weight_packed": ..., "weight_scale": ...}      what a checkpoint holds
                         QuantizedTensor <--read---                                                  what a kernel starts from

Names, dtypes and shapes are those of the compressed-tensors library, so that each side reads what the other wrote. Another layout of the same
values, another producer's or a kernel's own, is a `Format` too: its `twin` is the format that stores those values in that library's layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qplugins.kernels.linear.layout import Weight
from qplugins.kernels.linear.spec import SCALES, Spec
from qplugins.kernels.quantized import QuantizedTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointError(ValueError):
    """Something in a checkpoint is not as it has to be. The message names the tensor, what was expected and what was found."""


class Described(Protocol):
    """What is known of a tensor before it is read: a tensor has it, and so has its entry in a file's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _cells(length: int, per: int | None) -> int:
    return 1 if per is None else -(-length // per)


@dataclass(frozen=True)
class Param:
    """One tensor that a layer stores beside others.

    dtype  what it must be; None for any 16- or 32-bit float
    per    rows and columns of W that one element stands for, None for all of them: (1, 8) is eight columns an int32, (1, None) one
           scale a row, (8, 128) eight rows' zero points in an int32, a column a group. None: the tensor does not follow W, see `size`.
    axes   the axis of W that each dimension follows: (0, 1) for [N, K], (1, 0) for a transposed tensor, (1,) for one number a column
    size   its shape, where it does not follow W
    tile   the shape of one element, where it holds many numbers; in the last one of W's rows some may be padding
    optional  a layer may lack it, and nothing that runs here reads it
    writes    the dtype that is written where `dtype` leaves a choice; None for the model's own
    """

    name: str
    dtype: torch.dtype | None
    per: tuple[int | None, int | None] | None
    axes: tuple[int, ...] = (0, 1)
    size: tuple[int, ...] = (1,)
    tile: tuple[int, ...] = ()
    optional: bool = False
    writes: torch.dtype | None = None

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """The tensor's shape for a W of n rows and k columns."""
        return self.size if self.per is None else tuple(_cells((n, k)[axis], self.per[axis]) for axis in self.axes) + self.tile

    def check(self, where: str, found_dtype: torch.dtype, found_shape: tuple[int, ...], n: int, k: int) -> None:
        """Raises CheckpointError unless dtype and shape are right. `where` is the tensor's full name."""
        want = (self.dtype,) if self.dtype is not None else FLOATS
        if found_dtype not in want:
            raise CheckpointError(f"{where}: expected {' or '.join(str(d) for d in want)}, found {found_dtype}")
        shape = self.shape(n, k)
        # a single number is stored as [1] by some writers and as [] by others
        if tuple(found_shape) != shape and not (self.per is None and shape == (1,) and tuple(found_shape) == ()):
            raise CheckpointError(f"{where}: expected shape {list(shape)} for a {n} x {k} weight, found {list(found_shape)}")

    def slice(self, where: str, tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """The part of a whole `tensor` that belongs to W[rows[0]:rows[1], columns[0]:columns[1]], as a view.

        Raises CheckpointError when a boundary falls inside an element, as when a rank's columns are no whole number of groups.
        """
        if self.per is None:
            return tensor
        for dim, axis in enumerate(self.axes):
            (start, stop), per, what = (rows, columns)[axis], self.per[axis], ("rows", "columns")[axis]
            if per is None:
                continue
            whole = stop == start + tensor.shape[dim] * per or -(-stop // per) == tensor.shape[dim]
            if start % per or (stop % per and not whole):
                other = (
                    "a checkpoint that is not packed (`qplugins convert` makes one)"
                    if self.tile
                    else "a format with smaller groups for this layer"
                )
                raise CheckpointError(
                    f"{where}: {what} {start}..{stop} of this rank do not fall on multiples of {per}; use a tensor parallel size that "
                    f"divides the {what} into multiples of {per}, or {other}"
                )
            tensor = tensor.narrow(dim, start // per, _cells(stop, per) - start // per)
        return tensor


@dataclass(frozen=True, eq=False)  # there is one object of a name, which is equal to itself
class Format:
    """name        what a layer map calls it: "nvfp4", "int4_g128"
    params      the stored tensors, the codes first
    scheme      its entry in a compressed-tensors config: {"format": ..., "weights": {...}, "input_activations": ... or None}
    code        key of `kernels.decode.CODES`; None for a matrix that is not quantized
    group_size  columns that share a scale; None where a row, or the matrix, has one
    activation  what the layer's input becomes: None (left as it is), "token" (e4m3, a scale a token) or "tensor" (e4m3, one stored scale)
    quantize    (W float [N, K], amax, importance=None) -> QuantizedTensor. `amax` is the largest magnitude that a scale of the whole matrix must
                cover, None for W's own; siblings of a fused layer share it. `importance` is float32 [K], how much the square of an error in
                each column counts, None for all the same. None for a format that is only read.
    store, read  between a QuantizedTensor and the stored tensors; `read` takes them and (N, K)
    weight      of a layout that is the kernel's own: what `read` takes -> the same tensors as the kernel takes them
    problem     what is wrong with stored values that no shape shows, as a sentence that starts with the tensor's name, or None; takes what
                `read` takes
    twin        of another layout than the compressed-tensors library's: the format that stores the same values in that one
    permuted    whether the columns of a group lie anywhere in W, as a stored index says, rather than side by side
    """

    name: str
    params: tuple[Param, ...]
    scheme: Mapping[str, Any] | None = field(repr=False, default=None)
    code: str | None = None
    group_size: int | None = None
    activation: str | None = None
    quantize: Callable[..., QuantizedTensor] | None = field(repr=False, default=None)
    store: Callable[[QuantizedTensor], dict[str, Tensor]] | None = field(repr=False, default=None)
    read: Callable[[Mapping[str, Tensor], int, int], QuantizedTensor] | None = field(repr=False, default=None)
    weight: Callable[[Mapping[str, Tensor], int, int], Weight] | None = field(repr=False, default=None)
    problem: Callable[[Mapping[str, Tensor], int, int], str | None] = field(repr=False, default=lambda tensors, n, k: None)
    twin: "Format | None" = field(repr=False, default=None)
    permuted: bool = False

    def __reduce__(self) -> tuple:
        # engines send their configuration to other processes, where the format of that name is the same one
        from qplugins.formats import any_format

        return any_format, (self.name,)

    @property
    def quantized(self) -> bool:
        return self.code is not None

    @property
    def shares_amax(self) -> bool:
        """Whether one stored number scales the whole matrix. Engines keep one such number for a fused layer, so its parts have to agree."""
        return any(p.per is None and p.name.startswith("weight") and not p.optional for p in (self.twin or self).params)

    def infer_shape(self, tensors: Mapping[str, Described]) -> tuple[int, int] | None:
        """(N, K) of a layer, from the tensor that holds its codes; None where that is missing or no matrix.

        Tiles may be padded along N, which the first tensor that is not in tiles then tells.
        """
        codes = self.params[0]
        if codes.name not in tensors or len(tensors[codes.name].shape) != 2 + len(codes.tile):
            return None
        in_full = (p for p in self.params if not p.tile and 0 in p.axes and p.name in tensors and len(tensors[p.name].shape) == len(p.axes))
        n, k = (tensors[p.name].shape[p.axes.index(axis)] * p.per[axis] for axis, p in enumerate((next(in_full, codes), codes)))
        return n, k

    def refuses(self, n: int, k: int) -> str | None:
        """Why an n x k matrix cannot be stored in this format, as a sentence; None where it can."""
        if self.group_size is not None and k % self.group_size:
            return f"K = {k} is not a multiple of {self.group_size}, the group size of {self.name}"
        for p in self.params:
            if p.per is not None and p.per[1] is not None and k % p.per[1]:
                return f"K = {k} is not a multiple of {p.per[1]}, which {p.name} of {self.name} packs together"
        codes = self.params[0]
        if codes.tile and k == self.group_size:
            return f"K = {k} is a single group, and {self.name} stores the scales of several"
        if not codes.tile and n % codes.per[0]:
            return f"N = {n} is not a multiple of {codes.per[0]}, which {codes.name} of {self.name} packs together"
        return None

    def refuses_cut(self, columns: tuple[int, int], k: int) -> str | None:
        """Why a rank cannot have W[:, columns[0]:columns[1]] of k columns in all, as a sentence; None where it can, as far as formats know."""
        if self.permuted and columns != (0, k):
            return (
                f"columns {columns[0]}..{columns[1]} of {k} cannot be cut out of a {self.name} matrix, whose groups have columns from everywhere "
                "(act-order, desc_act); use tensor parallel size 1, or a checkpoint without it"
            )
        return None

    def spec(self, n: int, k: int) -> Spec:
        """What a kernel has to know of an n x k matrix in this format, for a bfloat16 model."""
        if self.code is None:
            return Spec(n, k)
        if self.twin is not None:
            return self.twin.spec(n, k)
        dtype = next(p.dtype for p in self.params if p.name == "weight_scale")
        scale = "f32" if self.code == "e4m3" else next(s for s, d in SCALES.items() if d == (dtype or torch.bfloat16))
        zero_point = any(p.name == "weight_zero_point" for p in self.params)
        return Spec(n, k, self.code, scale, None if self.group_size == k else self.group_size, zero_point, self.activation, self.permuted)

    def nbytes(self, n: int, k: int, model_dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that an n x k matrix takes, scales and all."""
        total = 0
        for p in self.params:
            if not p.optional:
                shape = p.shape(n, k)
                total += (p.dtype or p.writes or model_dtype).itemsize * torch.Size(shape).numel()
        return total

    def check(self, where: str, tensors: Mapping[str, Described], n: int, k: int) -> None:
        """Raises CheckpointError unless `tensors` are those of an n x k layer called `where`. Shapes and dtypes only, no values."""
        if reason := self.refuses(n, k):
            raise CheckpointError(f"{where}: {reason}")
        for p in self.params:
            if p.name in tensors:
                t = tensors[p.name]
                p.check(f"{where}.{p.name}", t.dtype, tuple(t.shape), n, k)
            elif not p.optional:
                raise CheckpointError(
                    f"{where}.{p.name}: missing; a layer in {self.name} has {', '.join(q.name for q in self.params if not q.optional)}"
                )
