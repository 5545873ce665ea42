"""The operators `qplugins::linear` and `qplugins::embedding`: what compiled graphs and CUDA graphs see, one call a layer.

A layer is a list of shards, each in its own format; spec.py says how `plan` describes them. Every shard writes its own columns of one output.
CPU tensors run the reference, whatever implementation the plan names.
"""

import torch
from torch import Tensor

from qplugins.kernels.linear import fp8, ref, variants
from qplugins.kernels.linear.spec import Shard, parse

_library = torch.library.Library("qplugins", "FRAGMENT")
_library.define("linear(Tensor x, Tensor[] tensors, str plan, Tensor? bias) -> Tensor")
_library.define("embedding(Tensor ids, Tensor[] tensors, str plan, ScalarType dtype) -> Tensor")


def _run_torch(x: Tensor, shard: Shard, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    w = tensors[0].to(x.dtype)
    if not out.is_contiguous():
        out.copy_(torch.nn.functional.linear(x, w, bias))
    elif bias is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(bias, x, w.T, out=out)


def _run_scaled_mm(x: Tensor, shard: Shard, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    fp8.linear(x, shard.spec, tensors, out, bias)


def _run_triton(x: Tensor, shard: Shard, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    variants.linear(x, shard.spec, tensors, out, bias)


def _run_reference(x: Tensor, shard: Shard, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    ref.linear(x, shard.implementation, shard.spec, tensors, out, bias)


_RUN = {"torch": _run_torch, "scaled_mm": _run_scaled_mm, "triton": _run_triton, "reference": _run_reference}


def _linear(x: Tensor, tensors: list[Tensor], plan: str, bias: Tensor | None) -> Tensor:
    layer = parse(plan)
    if x.shape[-1] != layer.k:
        raise ValueError(f"x should have K = {layer.k} columns for {plan}, has shape {tuple(x.shape)}")
    # outside of CUDA graphs, and for few rows, the CPU's time is what a layer takes: what need not be done is not
    rows = x if x.dim() == 2 else x.reshape(-1, layer.k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m = rows.shape[0]
    wanted = fp8.padded(m) if any(shard.implementation == "scaled_mm" for shard in layer.shards) else m
    whole = torch.empty(wanted, layer.n, dtype=x.dtype, device=x.device)
    y = whole if wanted == m else whole[:m]
    if y.numel():
        bias = None if bias is None else bias.to(x.dtype)
        on_cpu = x.device.type == "cpu"
        for shard in layer.shards:
            own = tensors[shard.first : shard.first + shard.count]
            run = _run_reference if on_cpu and shard.spec.code is not None else _RUN[shard.implementation]
            inputs = rows if shard.columns is None else rows.index_select(1, tensors[shard.columns])
            out = whole if run is _run_scaled_mm else y
            if shard.spec.n == layer.n:
                run(inputs, shard, own, out, bias)
            else:
                columns = slice(shard.start, shard.start + shard.spec.n)
                run(inputs, shard, own, out[:, columns], None if bias is None else bias[columns])
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layer.n)


def _linear_fake(x: Tensor, tensors: list[Tensor], plan: str, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], parse(plan).n)


def _embedding(ids: Tensor, tensors: list[Tensor], plan: str, dtype: torch.dtype) -> Tensor:
    layer = parse(plan)
    if len(layer.shards) != 1:
        raise ValueError(f"an embedding is one matrix; the plan has {len(layer.shards)} shards: {plan}")
    shard = layer.shards[0]
    found = ref.rows(shard.implementation, shard.spec, tensors[: shard.count], ids.reshape(-1).to(torch.int64))
    if shard.columns is not None:
        found = torch.empty_like(found).index_copy_(1, tensors[shard.columns].to(torch.int64), found)
    return found.to(dtype).view(*ids.shape, layer.k)


def _embedding_fake(ids: Tensor, tensors: list[Tensor], plan: str, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, parse(plan).k, dtype=dtype)


for _key in ("CPU", "CUDA"):
    _library.impl("linear", _linear, _key)
    _library.impl("embedding", _embedding, _key)
torch.library.register_fake("qplugins::linear", _linear_fake, lib=_library)
torch.library.register_fake("qplugins::embedding", _embedding_fake, lib=_library)


def linear(x: Tensor, tensors: list[Tensor] | tuple[Tensor, ...], plan: str, bias: Tensor | None = None) -> Tensor:
    """y[..., N] = x[..., K] @ W.T + bias, in x's dtype.

    tensors  the `Weight.tensors` of all shards, one after the other
    plan     what `spec.plan` made of the shards
    Raises ValueError where x's K is not the plan's.
    """
    return torch.ops.qplugins.linear.default(x, list(tensors), plan, bias)


def embedding(ids: Tensor, tensors: list[Tensor] | tuple[Tensor, ...], plan: str, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (any integer dtype and shape [...]) of a matrix, decoded: [..., K] of `dtype`."""
    return torch.ops.qplugins.embedding.default(ids, list(tensors), plan, dtype)
