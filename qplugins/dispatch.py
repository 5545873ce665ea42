"""The one place where an implementation is chosen for an operation.

Each operation has a short list of implementations, best first; each says in a sentence what it refuses. `choose` takes the first that
does not refuse, `explain` shows them all, which is what `qplugins inspect` prints.
"""

from dataclasses import dataclass

import torch

from qplugins.kernels import linear, moe
from qplugins.kernels.linear import Spec

OPERATIONS = {"linear": linear, "experts": moe}
"""y = x W^T, and the routed experts of a mixture, whose matrices are chosen for one by one all the same."""


@dataclass(frozen=True)
class Machine:
    """device "cpu" or "cuda" (ROCm calls itself cuda too); capability (major, minor), None off CUDA; name, for people."""

    device: str
    capability: tuple[int, int] | None
    name: str

    @classmethod
    def current(cls) -> "Machine":
        """The machine this process computes on."""
        if not torch.cuda.is_available():
            return CPU
        return cls("cuda", None if torch.version.hip else torch.cuda.get_device_capability(), torch.cuda.get_device_name())

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """The machine that tensors on `device` are computed on."""
        return CPU if device.type == "cpu" else cls.current()


CPU = Machine("cpu", None, "CPU")


def explain(spec: Spec, machine: Machine, dtype: torch.dtype = torch.bfloat16, operation: str = "linear") -> list[tuple[str, str | None]]:
    """Every implementation of an operation in order of preference, with its refusal of this matrix, or None.

    dtype  of the activations            operation  a key of OPERATIONS
    """
    op = OPERATIONS[operation]
    rows = [(name, op.refuses(name, spec, machine.device, machine.capability, dtype)) for name in op.IMPLEMENTATIONS]
    if machine.device != "cpu":
        # it would run, and serve a hundred times slower than anyone expects
        rows = [(name, why or (f"{name} is for CPUs and tests" if name == "reference" else None)) for name, why in rows]
    return rows


def choose(spec: Spec, machine: Machine, dtype: torch.dtype = torch.bfloat16, operation: str = "linear") -> str:
    """The name of the first implementation that does not refuse. Raises ValueError with every refusal when all do."""
    rows = explain(spec, machine, dtype, operation)
    for name, refusal in rows:
        if refusal is None:
            return name
    raise ValueError(f"nothing runs {spec} on {machine.name}: " + "; ".join(f"{name}: {why}" for name, why in rows))
