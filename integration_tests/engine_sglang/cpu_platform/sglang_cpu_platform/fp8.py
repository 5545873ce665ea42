"""SGLang's own FP8 on a CPU: its layers as they are, with the product, which is a CUDA kernel, computed in PyTorch.

For the one test that shows how SGLang alone loads a checkpoint; SGLANG_CPU_FP8=1 turns it on.
"""

import os


def register() -> None:
    """Entry point `sglang.srt.plugins`."""
    if os.environ.get("SGLANG_CPU_FP8") != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    compressed_tensors = "sglang.srt.layers.quantization.compressed_tensors"
    supported = f"{compressed_tensors}.compressed_tensors.CompressedTensorsConfig._check_scheme_supported"
    HookRegistry.register(supported, lambda self, capability, error=True: True, HookType.REPLACE)
    for product in ("apply_fp8_linear", "apply_fp8_ptpc_linear"):
        HookRegistry.register(f"{compressed_tensors}.schemes.compressed_tensors_w8a8_fp8.{product}", linear, HookType.REPLACE)


def linear(input, weight, weight_scale, input_scale=None, bias=None, **kwargs):
    """x [..., K], weight e4m3 [K, N], weight_scale [N, 1] or [1]: x W * scale; rounding the activations changes little and is left out."""
    w = weight.float() * weight_scale.float().reshape(1, -1)
    out = (input.float() @ w).to(input.dtype)
    return out if bias is None else out + bias
