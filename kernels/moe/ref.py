"""y[t] = sum_j topk_weights[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t])),   e = topk_ids[t, j], in float32: the definition.

A form of it that a CPU can serve from: experts one after the other, each with the tokens that chose it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from qplugins.kernels.linear import Plan, ref

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


def layer(x: Tensor, plan: Plan, tensors: list[Tensor], expert: int) -> Tensor:
    """float32 [M, N] = x[M, K] @ W.T for the matrix of one expert, in all its shards."""
    y = torch.empty(x.shape[0], plan.n, dtype=torch.float32, device=x.device)
    for s in plan.shards:
        own = [t[expert] for t in tensors[s.first : s.first + s.count]]
        mine = x if s.columns is None else x.index_select(1, tensors[s.columns][expert])
        ref.linear(mine, s.implementation, s.spec, own, y[:, s.start : s.start + s.spec.n])
    return y


def experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Plan, gate_up_tensors: list[Tensor], down: Plan, down_tensors: list[Tensor],
    activation: str,
) -> Tensor:  # fmt: skip
    """float32 [T, down.n]. An id that names none of the experts adds nothing."""
    y = torch.zeros(x.shape[0], down.n, dtype=torch.float32, device=x.device)
    count = gate_up_tensors[0].shape[0]
    for e in topk_ids.unique().tolist():
        if not 0 <= e < count:
            continue
        token, choice = (topk_ids == e).nonzero(as_tuple=True)
        gate, up = layer(x[token], gate_up, gate_up_tensors, e).chunk(2, 1)
        out = layer(ACTIVATIONS[activation](gate) * up, down, down_tensors, e)
        y.index_add_(0, token, out * topk_weights[token, choice, None].to(torch.float32))
    return y
