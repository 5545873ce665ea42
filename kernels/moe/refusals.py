"""What each implementation of the experts cannot run, each as a sentence; `refuses` returns None where it can.

triton      any code and scale that linear's Triton kernel reads, and plain 16-bit matrices; 16-bit activations
reference   everything, slowly
"""

import torch

from qplugins.kernels import linear
from qplugins.kernels.linear import Spec

IMPLEMENTATIONS = ("triton", "reference")
"""In the order of preference."""


def refuses(
    implementation: str,
    spec: Spec,
    device: torch.device | str,
    capability: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Why `implementation` cannot run experts whose matrices are `spec` there, as a sentence; None where it can. As `linear.refuses`."""
    if implementation == "triton" and spec.code is None:
        # one more format to this kernel, and as easy a one as 8 bits without groups: what remains to ask is the device and the dtype
        spec = Spec(spec.n, spec.k, "int8", "f32")
    return linear.refuses(implementation, spec, device, capability, dtype)
