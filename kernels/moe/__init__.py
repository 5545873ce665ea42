"""The routed experts of a mixture, E matrices of one format beside each other; gate, up and down may have different ones.

    gate_up = stack(pack(q, "triton") for q in gates_and_ups)
    down = stack(...)
    y = experts(x, topk_weights, topk_ids, [*gate_up.tensors, *down.tensors], plan([("triton", gate_up.spec)]), plan(...), "silu")

layout.py says how experts lie in memory, ref.py what is computed, kernel.py how on a GPU. Formats, plans: `linear/`.
"""

from qplugins.kernels.moe.layout import pack, stack
from qplugins.kernels.moe.op import experts
from qplugins.kernels.moe.ref import ACTIVATIONS
from qplugins.kernels.moe.refusals import IMPLEMENTATIONS, refuses

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "experts", "pack", "refuses", "stack"]
