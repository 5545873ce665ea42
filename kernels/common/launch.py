"""Launching a kernel without having Triton find out each time which of its compiled versions that is.

`kernel[grid](...)` looks at every argument, writes down what it would be compiled for, and looks that up: 30 us and more of a CPU's time on an H100's
host, often longer than the kernel itself takes. Inside of CUDA graphs nobody notices. Elsewhere, with a prompt of some hundred tokens, the GPU waits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qplugins.kernels.common.device import INTERPRET

MAX_INT32 = 2**31 - 1


class Launcher:
    """A kernel with all its constants: `Launcher(kernel, BLOCK=64, num_warps=4)(grid, x, y, n)` is `kernel[grid](x, y, n, BLOCK=64, num_warps=4)`.

    constants  of the kernel, all of its last parameters, and Triton's options
    Not asked again is what Triton asks besides: whether its knobs, or a global variable that the kernel reads, have changed since the first launch.
    Raises TypeError where one of the constants has a parameter behind it that is none.
    """

    def __init__(self, kernel: Any, **constants: object) -> None:
        self.kernel, self.constants = kernel, constants
        names = [name for name in kernel.arg_names if name in constants]
        if names != list(kernel.arg_names[len(kernel.arg_names) - len(names) :]):
            raise TypeError(f"a kernel's last parameters should be its constants: {', '.join(kernel.arg_names)} with {', '.join(names)}")
        self.last = tuple(constants[name] for name in names)
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: object) -> None:
        if INTERPRET.value:
            self.kernel[grid](*args, **self.constants)
            return
        key = (torch.cuda.current_device(), *compiled_for(args))
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*args, **self.constants)
        else:
            compiled[(*grid, 1, 1)](*args, *self.last)


def compiled_for(args: tuple[object, ...]) -> list[object]:
    """What tells apart the versions that Triton may compile for such arguments: types, and which sizes are 1 or multiples of 16, which pointers are of
    16 bytes. A descriptor's block and layout are taken to be the kernel's constants."""
    found: list[object] = []
    for a in args:
        if isinstance(a, int):
            found.append(1 if a == 1 else 2 + (a % 16 == 0) + 2 * (a > MAX_INT32))
        elif isinstance(a, Tensor):
            found += (a.dtype, a.data_ptr() % 16 == 0)
        elif isinstance(a, float):
            found.append(float)
        else:
            found.append(a.base.dtype)
    return found


class Place(NamedTuple):
    """What a TMA descriptor wants to know of a tensor. Descriptors are kept, and with one of these do not keep the tensor: whatever else is at
    that address later, the descriptor of it is the same."""

    address: int
    nbytes: int
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor | None) -> "Place | None":
        return None if t is None else cls(t.data_ptr(), t.nbytes, t.dtype)

    def data_ptr(self) -> int:
        return self.address
