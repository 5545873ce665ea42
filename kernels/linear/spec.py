"""What a layer is, as data that fits into a string: the operator takes it along, so that a compiled graph shows what it calls.

plan    shards joined by "; ", in the order of their columns in the output
shard   implementation, spec, shape           "triton e2m1*e4m3/16 1536x576"
spec    code*scale/group[+zero][+permuted][,activation]  "int4*bf16/128+zero"    "e4m3*f32/row,token"    "plain" for a 16-bit matrix
"""

import re
from dataclasses import dataclass
from functools import cache

import torch

from qplugins.kernels.decode import CODES
from qplugins.kernels.quantized import QuantizedTensor

SCALES = {
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "f32": torch.float32,
}
ACTIVATIONS = ("token", "tensor")
_SHARD = re.compile(
    r"(?P<impl>\w+) (?:plain|(?P<code>\w+)\*(?P<scale>\w+)/(?P<group>\d+|row)(?P<zero>\+zero)?(?P<permuted>\+permuted)?(?:,(?P<act>\w+))?)"
    r" (?P<n>\d+)x(?P<k>\d+)"
)


@dataclass(frozen=True)
class Spec:
    """A matrix of n rows and k columns, as a layer stores it.

    code        key of `decode.CODES`; None for a matrix that is not quantized, and then nothing below means anything
    scale       key of SCALES
    group       columns that share a scale; None where a row has one, also when it was given as k
    zero_point  whether groups have one
    activation  what the layer's input is rounded to: None (left alone), "token" (e4m3, a scale a row of x), "tensor" (e4m3, one stored scale)
    permuted    whether the matrix' columns are in another order than x's. The operator puts x in that order, so that kernels never see it
    """

    n: int
    k: int
    code: str | None = None
    scale: str | None = None
    group: int | None = None
    zero_point: bool = False
    activation: str | None = None
    permuted: bool = False

    def __post_init__(self) -> None:
        if self.code is None:
            return
        if self.code not in CODES:
            raise ValueError(f"unknown code {self.code!r}; there are {', '.join(CODES)}")
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}; there are {', '.join(SCALES)}")
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        if self.group is not None and (self.group <= 0 or self.k % self.group):
            raise ValueError(f"K = {self.k} is not a multiple of the group size {self.group}")
        if self.group == self.k:
            object.__setattr__(self, "group", None)

    @property
    def bits(self) -> int:
        """Of a code; 16 where the matrix is not quantized."""
        return 16 if self.code is None else CODES[self.code].bits

    def __str__(self) -> str:
        if self.code is None:
            return f"plain {self.n}x{self.k}"
        zero = "+zero" * self.zero_point + "+permuted" * self.permuted
        activation = f",{self.activation}" if self.activation else ""
        return f"{self.code}*{self.scale}/{self.group or 'row'}{zero}{activation} {self.n}x{self.k}"


def spec_of(q: QuantizedTensor | torch.Tensor, activation: str | None = None) -> Spec:
    """The spec of a matrix, quantized or plain."""
    if isinstance(q, torch.Tensor):
        return Spec(*q.shape)
    scale = next(name for name, dtype in SCALES.items() if dtype == q.scale.dtype)
    return Spec(*q.shape, q.code, scale, q.group_size, q.zero_point is not None, activation, q.columns is not None)


@dataclass(frozen=True)
class Shard:
    """Rows start .. start + spec.n of the layer's matrix; tensors first .. first + count of the operator's list are its own.

    columns  which of the operator's tensors says in what order the shard, whose spec is then one of a matrix that is not permuted, reads
             x's columns; None where it reads them as they are
    """

    implementation: str
    spec: Spec
    start: int
    first: int
    count: int
    columns: int | None = None


@dataclass(frozen=True)
class Plan:
    """All shards of a layer: n rows together, k columns each, and so many tensors."""

    n: int
    k: int
    shards: tuple[Shard, ...]
    tensors: int


def plan(shards: list[tuple[str, Spec]]) -> str:
    """The string for (implementation, spec) pairs. Raises ValueError where their K differ."""
    text = "; ".join(f"{implementation} {spec}" for implementation, spec in shards)
    parse(text)
    return text


@cache
def parse(text: str) -> Plan:
    """The inverse of `plan`. Raises ValueError where the text is none."""
    from qplugins.kernels.linear.layout import tensor_names

    shards: list[Shard] = []
    start = first = 0
    for part in text.split("; "):
        m = _SHARD.fullmatch(part)
        if m is None:
            raise ValueError(f"{part!r} is no shard of a plan; one looks like 'triton e2m1*e4m3/16 1536x576'")
        n, k = int(m["n"]), int(m["k"])
        spec = Spec(n, k)
        if m["code"]:
            group = None if m["group"] == "row" else int(m["group"])
            spec = Spec(n, k, m["code"], m["scale"], group, m["zero"] is not None, m["act"])
        if shards and k != shards[0].spec.k:
            raise ValueError(f"shards of one layer read the same input, but have K = {shards[0].spec.k} and {k}: {text}")
        count = len(tensor_names(m["impl"], spec))
        columns = first + count if m["permuted"] else None
        shards.append(Shard(m["impl"], spec, start, first, count, columns))
        start, first = start + n, first + count + (columns is not None)
    return Plan(start, shards[0].spec.k, tuple(shards), first)
