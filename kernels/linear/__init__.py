"""y = x W^T, W in any format and a fused layer's shards each in its own.

    weight = pack(quantized_tensor, "triton")
    y = linear(x, weight.tensors, plan([(weight.implementation, weight.spec)]), bias)

spec.py says what a layer is, layout.py how it lies in memory, ref.py what is computed, kernel.py how on a GPU,
few.py (on Hopper) how for very few rows, wide.py (on Hopper) and dense.py (elsewhere) for many; variants.py chooses.
"""

from qplugins.kernels.linear.layout import Weight, fuse, pack, unpack
from qplugins.kernels.linear.op import embedding, linear
from qplugins.kernels.linear.refusals import IMPLEMENTATIONS, refuses
from qplugins.kernels.linear.spec import Plan, Shard, Spec, parse, plan, spec_of
from qplugins.kernels.linear.variants import warm

__all__ = [
    "IMPLEMENTATIONS",
    "Plan",
    "Shard",
    "Spec",
    "Weight",
    "embedding",
    "fuse",
    "linear",
    "pack",
    "parse",
    "plan",
    "refuses",
    "spec_of",
    "unpack",
    "warm",
]
