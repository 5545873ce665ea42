"""Experts one behind the other: every tensor of one expert's matrix, as `linear/layout.py` lays it out, with an axis [E, ...] in front.

A kernel finds expert e by one multiplication, and a slice [e] is that expert's matrix in the layout that `qplugins::linear` reads. Only
`locks` are then not an expert's own: they are zeros that any programs may count in.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qplugins.kernels import linear
from qplugins.kernels.linear import Plan, Weight
from qplugins.kernels.linear.layout import tensor_names
from qplugins.kernels.quantized import QuantizedTensor


def pack(q: QuantizedTensor | Tensor | Weight, implementation: str) -> Weight:
    """One expert's matrix as `implementation`, "triton" or "reference", reads it. What it multiplies stays in 16 bits, whatever its format.

    q  a quantized matrix, packed or not, or a float one [N, K], which here both implementations run: a layer's experts need not all be quantized
    """
    if isinstance(q, Tensor):
        return Weight(implementation, linear.spec_of(q), (q.contiguous(),))
    return linear.pack(q, implementation)


def stack(weights: Iterable[Weight], experts: int | None = None) -> Weight:
    """E packed matrices -> one Weight: the spec of each of them, tensors [E, ...].

    experts  E, where `weights` is a generator: one that packs an expert at a time leaves no more than that one in memory beside the stack

    Raises ValueError where a matrix differs from the first in spec, implementation, shape or dtype, with its number, and where their number
    is not E.
    """
    if experts is None:
        weights = list(weights)
        experts = len(weights)
    first, stacked, e = None, [], -1
    for e, w in enumerate(weights):
        if first is None:
            first, stacked = w, [torch.empty(experts, *t.shape, dtype=t.dtype, device=t.device) for t in w.tensors]
        if e == experts:
            raise ValueError(f"{experts} experts were promised, and there are more")
        if _form(w) != _form(first):
            raise ValueError(f"experts that run as one have one form: expert {e} is {_form(w)}, expert 0 is {_form(first)}")
        for s, t in zip(stacked, w.tensors, strict=True):
            s[e].copy_(t)
    if first is None or e + 1 < experts:
        raise ValueError(f"{experts} experts were promised, {e + 1} were given")
    return Weight(first.implementation, first.spec, tuple(stacked))


def divide(tensors: Sequence[Tensor], gate_up: Plan, down: Plan) -> tuple[list[Tensor], list[Tensor]]:
    """The operator's tensors -> those of gate and up, those of down. Raises ValueError where they are not as many as the plans say."""
    if len(tensors) != gate_up.tensors + down.tensors:
        raise ValueError(f"gate and up have {gate_up.tensors} tensors, down has {down.tensors}; {len(tensors)} were given")
    return list(tensors[: gate_up.tensors]), list(tensors[gate_up.tensors :])


def _form(w: Weight) -> str:
    """All that experts of one stack have in common, for people."""
    names = tensor_names(w.implementation, w.spec)
    tensors = ", ".join(f"{name} {str(t.dtype)[6:]}{list(t.shape)}" for name, t in zip(names, w.tensors, strict=True))
    return f"{w.implementation} {w.spec} ({tensors})"
