"""Other people's kernels, called as their engines call them. Each function returns one call for each copy of the weights, or raises.

Marlin, Machete and humming come through vLLM's own layer kernels (0.33: vllm.model_executor.kernels.linear): the layer is filled as vLLM's
compressed-tensors schemes fill it, the kernel repacks it, `apply_weights` runs it.
"""

import tempfile
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qplugins.kernels.linear import fp8, pack
from qplugins.kernels.quantized import QuantizedTensor

Calls = Callable[[Tensor], list[Callable[[], Tensor]]]  # x -> a call for each copy


def cublas(q: QuantizedTensor, copies: int) -> Calls:
    """bf16 weights, which is what quantization is up against."""
    w = q.dequantize().to(torch.bfloat16)
    ws = [w.roll(i, 0) if i else w for i in range(copies)]
    return lambda x: [lambda w=w: torch.nn.functional.linear(x, w) for w in ws]


def scaled_mm(q: QuantizedTensor, copies: int, quantizer: bool = False) -> Calls:
    """FP8 weights and activations: torch._scaled_mm, with scales a row of each; alone, or with the rounding of x in front."""
    _only(q, "e4m3")
    w = pack(q, "scaled_mm", activation="token")
    # roll does not know e4m3
    ws = [[t.view(torch.uint8).roll(i, 0).view(t.dtype) for t in w.tensors] for i in range(copies)]

    def calls(x: Tensor) -> list[Callable[[], Tensor]]:
        if quantizer:
            y = torch.empty(fp8.padded(x.shape[0]), w.spec.n, dtype=x.dtype, device=x.device)

            def call(tensors: list[Tensor]) -> Tensor:
                fp8.linear(x, w.spec, tensors, y)
                return y[: x.shape[0]]

            return [lambda t=t: call(t) for t in ws]
        a, s = fp8.quantize(x)
        return [lambda t=t: torch._scaled_mm(a, t[0].T, s, t[1][None, :], out_dtype=x.dtype) for t in ws]

    return calls


def _only(q: QuantizedTensor, *codes: str) -> None:
    if q.code not in codes:
        raise NotImplementedError(f"not for {q.code}")


@cache
def _vllm_world() -> None:
    """vLLM's parameters ask for the tensor parallel rank: a world of one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    context = set_current_vllm_config(VllmConfig())
    context.__enter__()
    meeting = f"file://{tempfile.mkdtemp()}/world"  # no port: several of these may run side by side
    init_distributed_environment(world_size=1, rank=0, distributed_init_method=meeting, local_rank=0)
    initialize_model_parallel()


def _layer(n: int, k: int) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.output_partition_sizes = layer.logical_widths = [n]
    layer.input_size = layer.input_size_per_partition = k
    layer.output_size = layer.output_size_per_partition = n
    layer.params_dtype = layer.orig_dtype = torch.bfloat16
    layer.has_bias = False
    layer.bias = None
    return layer


def _fixed(t: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(t, requires_grad=False)


def _apply(make: Callable[[], tuple], copies: int) -> Calls:
    """make() -> (kernel, layer), once for each copy: repacked from the same weights."""
    made = [make() for _ in range(copies)]
    return lambda x: [lambda kernel=kernel, layer=layer: kernel.apply_weights(layer, x) for kernel, layer in made]


def _float4(q: QuantizedTensor, nvfp4: type, mxfp4: type, mxfp4_config: type, copies: int) -> Calls:
    n, k = q.shape
    packed = q.codes[:, 0::2] | (q.codes[:, 1::2] << 4)

    def make() -> tuple:
        from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig

        layer = _layer(n, k)
        layer.weight, layer.weight_scale = _fixed(packed.clone()), _fixed(q.scale.clone())
        if q.global_scale is None:
            kernel = mxfp4(mxfp4_config())
        else:
            kernel = nvfp4(NvFp4LinearLayerConfig())
            layer.weight_global_scale = _fixed(q.global_scale.clone())
        kernel.process_weights_after_loading(layer)
        return kernel, layer

    return _apply(make, copies)


def _integer(q: QuantizedTensor, kernel_type: type, copies: int) -> Calls:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
    from vllm.scalar_type import scalar_types

    n, k = q.shape
    bits = 4 if q.code == "int4" else 8
    if q.zero_point is not None:
        raise NotImplementedError("zero points are not timed here")
    codes = q.codes[:, 0::2] | (q.codes[:, 1::2] << 4) if bits == 4 else q.codes
    words = codes.contiguous().view(torch.int32)
    config = MPLinearLayerConfig(
        full_weight_shape=(k, n),
        partition_weight_shape=(k, n),
        weight_type=scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128,
        act_type=torch.bfloat16,
        group_size=-1 if q.group_size == k else q.group_size,
        zero_points=False,
    )
    possible = kernel_type.can_implement(config)
    if not possible[0]:
        raise NotImplementedError(possible[1])

    def make() -> tuple:
        layer = _layer(n, k)
        loader = {"weight_loader": lambda *_: None}
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(data=words.clone(), input_dim=1, output_dim=0, packed_dim=1, packed_factor=32 // bits, **loader),
        )
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=q.scale.clone(), input_dim=1, output_dim=0, **loader))
        kernel = kernel_type(config, w_q_param_name="weight_packed", w_s_param_name="weight_scale", w_zp_param_name="weight_zero_point")
        kernel.process_weights_after_loading(layer)
        return kernel, layer

    return _apply(make, copies)


def marlin(q: QuantizedTensor, copies: int) -> Calls:
    _only(q, "e2m1", "int4", "int8")
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.mxfp4.marlin import MarlinMxFp4LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel

    _vllm_world()
    if q.code == "e2m1":
        return _float4(q, MarlinNvFp4LinearKernel, MarlinMxFp4LinearKernel, MxFp4LinearLayerConfig, copies)
    return _integer(q, MarlinLinearKernel, copies)


def humming(q: QuantizedTensor, copies: int) -> Calls:
    _only(q, "e2m1", "int4", "int8")
    import humming  # noqa: F401
    from vllm.model_executor.kernels.linear.mixed_precision.humming import HummingLinearKernel
    from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.mxfp4.humming import HummingMxFp4LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.humming import HummingNvFp4LinearKernel

    _vllm_world()
    if q.code == "e2m1":
        return _float4(q, HummingNvFp4LinearKernel, HummingMxFp4LinearKernel, MxFp4LinearLayerConfig, copies)
    return _integer(q, HummingLinearKernel, copies)


def machete(q: QuantizedTensor, copies: int) -> Calls:
    _only(q, "int4", "int8")
    from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel

    _vllm_world()
    return _integer(q, MacheteLinearKernel, copies)


RIVALS: dict[str, Callable[[QuantizedTensor, int], Calls]] = {
    "cublas bf16": cublas,
    "scaled_mm alone": scaled_mm,
    "marlin": marlin,
    "humming": humming,
    "machete": machete,
}
