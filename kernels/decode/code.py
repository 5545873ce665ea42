"""A code: so many bits, the value of each bit pattern, and where the kernel layout puts its bits."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Code:
    """name; bits (4 or 8); values: float32 [2 ** bits], the value of each pattern.

    places  bit b of code j stands at bit places[j][b] of a 16-bit word in the kernel layout (linear/layout.py): 16 / bits codes a word
    """

    name: str
    bits: int
    values: Tensor
    places: tuple[tuple[int, ...], ...]
