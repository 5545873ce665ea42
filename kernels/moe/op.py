"""The operator `qplugins::experts`: the routed experts of a layer, what compiled graphs and CUDA graphs see as one call.

Shards and plans are those of `linear/spec.py`: gate and up are the rows of one matrix, in as many shards as they have formats, down is
another matrix. CPU tensors run the reference, whatever implementation the plans name.
"""

import torch
from torch import Tensor

from qplugins.kernels.linear.spec import Plan, parse
from qplugins.kernels.moe import kernel, ref
from qplugins.kernels.moe.layout import divide

_library = torch.library.Library("qplugins", "FRAGMENT")
_library.define(
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] tensors, str gate_up_plan, str down_plan, str activation) -> Tensor"
)


def _check(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Plan, down: Plan, activation: str) -> None:
    if x.ndim != 2 or x.shape[1] != gate_up.k:
        raise ValueError(f"x should be [tokens, {gate_up.k}], what gate and up take, has shape {tuple(x.shape)}")
    if gate_up.n != 2 * down.k:
        raise ValueError(f"gate and up should have 2 * {down.k} rows together for down's {down.k} columns, have {gate_up.n}")
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids should be [{x.shape[0]}, choices of a token], has shape {tuple(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights should be {tuple(topk_ids.shape)}, as topk_ids is, has shape {tuple(topk_weights.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids should be int32 or int64, is {topk_ids.dtype}")
    if activation not in ref.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ref.ACTIVATIONS)}")


def _experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, tensors: list[Tensor], gate_up_plan: str, down_plan: str, activation: str
) -> Tensor:
    gate_up, down = parse(gate_up_plan), parse(down_plan)
    _check(x, topk_weights, topk_ids, gate_up, down, activation)
    ours, theirs = divide(tensors, gate_up, down)
    names = {s.implementation for s in (*gate_up.shards, *down.shards)}
    if x.device.type != "cpu" and names != {"reference"}:
        if names != {"triton"}:
            raise ValueError(
                f"one implementation runs all of a layer's experts, triton or reference; the plans name {', '.join(sorted(names))}"
            )
        if topk_ids.numel():
            x = x if x.stride(1) == 1 else x.contiguous()
            return kernel.experts(x, topk_weights, topk_ids, gate_up, ours, down, theirs, activation)
    return ref.experts(x, topk_weights, topk_ids, gate_up, ours, down, theirs, activation).to(x.dtype)


def _experts_fake(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, tensors: list[Tensor], gate_up_plan: str, down_plan: str, activation: str
) -> Tensor:
    return x.new_empty(x.shape[0], parse(down_plan).n)


for _key in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _key)
torch.library.register_fake("qplugins::experts", _experts_fake, lib=_library)


def experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, tensors: list[Tensor] | tuple[Tensor, ...], gate_up_plan: str, down_plan: str,
    activation: str,
) -> Tensor:  # fmt: skip
    """y[t] = sum_j topk_weights[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t])),  e = topk_ids[t, j]; in x's dtype, sums in float32.

    x             [T, K] bfloat16 or float16; float32 too where the reference runs
    topk_weights  float32 [T, k]
    topk_ids      int32 or int64 [T, k]: experts of this rank, 0 .. E - 1; any other number, -1 say, adds nothing
    tensors       of gate_up's shards and then of down's, each as `stack` makes them: [E, ...]
    gate_up_plan  what `linear.plan` made of shards with 2 I rows together, gate's first, then up's; K columns
    down_plan     the same for shards with I columns
    activation    "silu", "gelu" (with erf, as in torch), "gelu_tanh" (its approximation with tanh)

    Raises ValueError where shapes and plans do not fit together.
    """
    return torch.ops.qplugins.experts(x, topk_weights, topk_ids, list(tensors), gate_up_plan, down_plan, activation)
