"""SGLang on a CPU in plain PyTorch, for tests.

SGLang's own CPU engine is built on AMX kernels (`sgl_kernel`), which PyPI has for CUDA only. This platform is what is left without them:
the torch_native attention, eager execution, one device.
"""


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: the platform's class, or None on a machine with a GPU."""
    import torch

    return None if torch.cuda.is_available() else "sglang_cpu_platform.platform:CpuPlatform"
