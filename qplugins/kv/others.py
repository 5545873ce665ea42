"""How other KV caches round keys and values, for comparison in quality studies only: K and V float [tokens, heads, D] -> what is read back.

`through(page)` does the same with a layout of this package: one write, one gather.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qplugins.kernels.kv import ref
from qplugins.kernels.kv.page import Page
from qplugins.kernels.kv.rotation import rotate

Rounding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fp8(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 without a scale, what `--kv-cache-dtype fp8` does where a checkpoint has none."""
    return tuple(x.to(torch.float8_e4m3fn).to(torch.float32) for x in (k, v))


def int4_per_token_head(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The algorithm of vLLM's dtype of that name: 4 bits, one asymmetric scale a token and head, after a Hadamard rotation."""
    return tuple(rotate(ref.decode(*_args(rotate(x)))) for x in (k, v))


def _args(x: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    codes, scale, zero = ref.encode(x, 4)
    return codes, 4, scale, zero


def through(page: Page, chunk: int | None = None) -> Rounding:
    """K and V written into pages, `chunk` tokens at a time (None: all at once), and read back."""

    def rounding(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n, heads = k.shape[:2]
        table = torch.arange(-(-n // page.page_size))[None]
        pages = torch.zeros(table.shape[1], heads, page.nbytes, dtype=torch.uint8)
        for a in range(0, n, chunk or n):
            b = min(n, a + (chunk or n))
            ref.write(pages, k[a:b], v[a:b], torch.arange(a, b), torch.tensor([0, b - a]), torch.tensor([b]), table, page)
        return ref.gather(pages, table, torch.tensor([0]), torch.tensor([0, n]), n, page, torch.float32)

    return rounding
