"""A linear layer as an engine builds it: one matrix, or several side by side (q, k, v; gate, up), each in a format of its own.

Engine-neutral. An adapter says which rows and columns of each matrix this rank owns, hands over checkpoint tensors as they come, and
calls `finish` when loading is done. Neighbours that end up in the same form are then joined and run as one product; others write into
their slices of one output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qplugins.dispatch import Machine, choose
from qplugins.formats import CheckpointError, Format
from qplugins.kernels import linear as ops
from qplugins.kernels.linear import Spec, Weight
from qplugins.kernels.quantized import QuantizedTensor


@dataclass(frozen=True)
class Span:
    """Rows and columns [start, stop) of a whole matrix of n rows and k columns: what one rank owns."""

    n: int
    k: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


class Shard(nn.Module):
    """One matrix: its stored tensors while loading. `name` is the checkpoint's module name."""

    def __init__(self, name: str, fmt: Format, span: Span, dtype: torch.dtype) -> None:
        super().__init__()
        if reason := fmt.refuses_cut(span.columns, span.k):
            raise ValueError(f"{name}: {reason}")
        self.name, self.format, self.span, self.dtype = name, fmt, span, dtype
        self.loaded: set[str] = set()
        for p in fmt.params:
            t = torch.empty(p.shape(*span.shape), dtype=p.dtype or dtype)
            self.register_parameter(p.name, nn.Parameter(t, requires_grad=False))

    def load(self, param: str, tensor: Tensor) -> None:
        """Copies this rank's part of a whole checkpoint tensor. Raises CheckpointError unless dtype and shape are what the format stores."""
        p = next((p for p in self.format.params if p.name == param), None)
        where = f"{self.name}.{param}"
        if p is None:
            raise CheckpointError(
                f"{where}: a layer in {self.format.name} has {', '.join(q.name for q in self.format.params)}, not {param}"
            )
        p.check(where, tensor.dtype, tuple(tensor.shape), self.span.n, self.span.k)
        if param == "weight_shape" and tuple(tensor.tolist()) != (self.span.n, self.span.k):
            raise CheckpointError(f"{where}: expected [{self.span.n}, {self.span.k}], the model's, found {tensor.tolist()}")
        mine = p.slice(where, tensor, self.span.rows, self.span.columns)
        mine, held = mine.reshape(p.shape(*self.span.shape)), getattr(self, param)
        if p.dtype is None and self.format.quantized:
            # a scale rounded to the model's dtype would be another scale
            held.data = held.data.to(tensor.dtype)
        held.data.copy_(mine)
        self.loaded.add(param)

    def load_random(self) -> None:
        """Random numbers in place of a checkpoint's. Raises ValueError for a format that is only read."""
        if self.format.quantized and self.format.quantize is None:
            raise ValueError(f"{self.name}: random weights are quantized when made, and {self.format.name} is a format that is only read")
        w = torch.randn(self.span.shape, device=next(self.parameters()).device).mul_(0.02).to(self.dtype)
        stored = self.format.store(self.format.quantize(w, None)) if self.format.quantized else {"weight": w}
        for name, tensor in stored.items():
            getattr(self, name).data.copy_(tensor)
            self.loaded.add(name)

    @property
    def missing(self) -> list[str]:
        """The tensors that have yet to be loaded, less those that a layer may lack."""
        return [p.name for p in self.format.params if p.name not in self.loaded and not p.optional]

    def matrix(self) -> "Matrix":
        """What was loaded. Raises CheckpointError for a missing tensor, for scales that are not finite, and whatever else the format sees."""
        if self.missing:
            raise CheckpointError(
                f"{self.name}: {', '.join(self.missing)} not found in the checkpoint; a layer in {self.format.name} needs them"
            )
        tensors = {p.name: getattr(self, p.name).data for p in self.format.params if p.name in self.loaded}
        for name, t in tensors.items():
            if "scale" in name:
                bad = ~torch.isfinite(t.to(torch.float32)) if t.dtype != torch.uint8 else t == 255
                if bad.any():
                    raise CheckpointError(
                        f"{self.name}.{name}: {int(bad.sum())} of {t.numel()} scales are NaN or infinite; the checkpoint is damaged"
                    )
        if problem := self.format.problem(tensors, *self.span.shape):
            raise CheckpointError(f"{self.name}.{problem}")
        if not self.format.quantized:
            return Matrix(self.format, tensors["weight"])
        input_scale = tensors["input_scale"] if self.format.activation == "tensor" else None
        as_kernel_reads_it = self.format.weight or self.format.read
        return Matrix(self.format, as_kernel_reads_it(tensors, *self.span.shape), input_scale)


@dataclass(frozen=True)
class Matrix:
    """A matrix on its way from a checkpoint to a kernel: quantized, packed where the checkpoint is, or plain where its format is bf16."""

    format: Format
    weight: QuantizedTensor | Tensor | Weight
    input_scale: Tensor | None = None

    @property
    def spec(self) -> Spec:
        """What a kernel has to know of it."""
        return self.weight.spec if isinstance(self.weight, Weight) else ops.spec_of(self.weight, self.format.activation)


class MixedLinear(nn.Module):
    """y = x [W_0; W_1; ...]^T.

    Built from shards whose tensors come through `load`, or of none and filled through `finish(matrices)`.
    """

    def __init__(self, shards: Sequence[Shard] = ()) -> None:
        super().__init__()
        self.shards = nn.ModuleList(shards)
        self.operands = nn.ParameterList()
        self.plan = ""

    def load(self, param: str, tensor: Tensor, ids: Sequence[int]) -> None:
        """Hands a checkpoint tensor to the shard it belongs to; one that covers several, fused on disk, is split along its rows.

        Raises CheckpointError for one that comes after `finish`.
        """
        if self.plan:
            raise CheckpointError(
                f"{param}: the layer is loaded already, and its weights cannot be loaded anew; start the engine again instead"
            )
        if len(ids) == 1:
            self.shards[ids[0]].load(param, tensor)
            return
        start = 0
        for shard in (self.shards[i] for i in ids):
            p = next((p for p in shard.format.params if p.name == param), None)
            if p is None:
                raise CheckpointError(f"{shard.name}.{param}: a layer in {shard.format.name} does not store it")
            stop = start + shard.span.n
            # weight_shape speaks of the whole
            if param != "weight_shape":
                shard.load(param, p.slice(f"{shard.name}.{param}", tensor, (start, stop), (0, shard.span.k)))
            start = stop

    def load_random(self) -> None:
        """Random matrices in place of a checkpoint's, for an engine's `--load-format dummy`: speed can be measured without one."""
        for shard in self.shards:
            shard.load_random()

    def finish(self, matrices: Sequence[Matrix] | None = None, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> str:
        """Turns what was loaded, or `matrices`, into what the kernels read, frees the rest, and has kernels compiled.

        dtype  of the activations        bias  whether `forward` will be given one

        Returns the plan: which implementation runs which part. Raises CheckpointError when something has not been loaded, ValueError when
        nothing here can run a part.
        """
        if matrices is None:
            matrices = [shard.matrix() for shard in self.shards]
            self.shards = nn.ModuleList()
        weights = []
        for m in matrices:
            name = choose(m.spec, Machine.of(m.weight.device), dtype)
            weights.append(ops.pack(m.weight, name, activation=m.format.activation, input_scale=m.input_scale))
        weights = ops.fuse(weights)
        self.operands.extend(nn.Parameter(t, requires_grad=False) for w in weights for t in w.tensors)
        self.plan = ops.plan([(w.implementation, w.spec) for w in weights])
        ops.warm(self.plan, list(self.operands), dtype, bias)
        return self.plan

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]"""
        return ops.linear(x, list(self.operands), self.plan, bias)

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix as an embedding table: ids [...] -> [..., K]."""
        return ops.embedding(ids, list(self.operands), self.plan, dtype)


def has_bias(layer: nn.Module) -> bool:
    """Whether an engine's linear layer has a bias, which both engines keep under that name."""
    return getattr(layer, "bias", None) is not None


def quantize_weight(weight: Tensor, sizes: Sequence[int], formats: Sequence[Format]) -> list[Matrix]:
    """Quantizes a fused 16-bit weight [sum(sizes), K], each slice of rows in its own format; for `MixedLinear.finish`.

    Slices of one format share what covers a whole matrix, as they do in a checkpoint that `qplugins quantize` writes.
    """
    slices = list(zip(weight.split(list(sizes)), formats, strict=True))
    amax = {f: torch.stack([w.abs().amax() for w, g in slices if g is f]).amax() for f in set(formats)}
    return [Matrix(f, f.quantize(w, amax[f]) if f.quantized else w.clone()) for w, f in slices]


def pad_rows(matrix: Matrix, n: int) -> Matrix:
    """A quantized matrix with rows of zeros appended up to `n`, as engines pad a vocabulary."""
    extra = n - matrix.spec.n
    if extra == 0:
        return matrix
    q = ops.unpack(matrix.weight) if isinstance(matrix.weight, Weight) else matrix.weight

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t.view(torch.uint8), t.new_zeros(extra, t.shape[1]).view(torch.uint8)]).view(t.dtype)

    # a scale of zero makes zeros of any code; where a scale is an exponent the code is e2m1, whose pattern 0 is zero
    zero = None if q.zero_point is None else pad(q.zero_point)
    padded = replace(q, codes=pad(q.codes), scale=pad(q.scale), zero_point=zero)
    return Matrix(matrix.format, padded, matrix.input_scale)
