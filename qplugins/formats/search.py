"""Choice of scales: of a few candidates a group, the one with the least squared error.

Clipping a group's largest value a little often helps all the others; how much is a matter of trying. Each candidate is tried as it will be
stored, rounded to the scale's own dtype. Rows are walked in blocks, so that the working memory does not grow with the matrix.

Where it is known how large a layer's inputs are, a column's error counts by that: an output is off by the sum of all columns' errors times their inputs,
and if those were independent its mean square would be the sum of the squares weighed by the inputs' mean squares. That is the diagonal of the
matrix that GPTQ (arXiv 2210.17323) corrects its rounding by, and what llama.cpp calls an importance matrix.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# elements of W held in float32 at a time: on a CPU what its cache holds, on a GPU what fills it
BLOCK_CPU, BLOCK_GPU = 1 << 18, 1 << 24


def quotient(x: Tensor, by: float) -> Tensor:
    """x / by, float32, to the same last bit on a CPU and on a GPU, where PyTorch makes `x / by` a product with the rounded 1 / by.

    A scale that is off by its last bit sends weights half way between two codes to the other one, and there can be many of them: where W has
    few distinct values, as one that was quantized before.
    """
    return x / x.new_full((), by)


def least_squares(
    w: Tensor,
    group_size: int,
    candidates: Callable[[Tensor], Iterable[tuple[Tensor, ...]]],
    encode: Callable[..., Tensor],
    decode: Callable[..., Tensor],
    importance: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Codes and parameters of the best candidate in each group of `w`.

    w           [N, K]
    candidates  groups float32 [R, G, group_size] -> tuples of parameters, each [R, G]
    encode      (groups, *parameters [R, G, 1]) -> codes uint8 [R, G, group_size]
    decode      (codes, *parameters [R, G, 1]) -> float32 of the same shape
    importance  float32 [K], what the square of an error in each column counts; None: all the same
    returns     (codes uint8 [N, K], *parameters [N, G])
    """
    n, k = w.shape
    weight = None if importance is None else importance.to(w.device, torch.float32).view(1, k // group_size, group_size)
    rows = max(1, (BLOCK_CPU if w.device.type == "cpu" else BLOCK_GPU) // k)
    blocks = []
    for start in range(0, n, rows):
        x = w[start : start + rows].to(torch.float32).view(-1, k // group_size, group_size)
        best: list[Tensor] = []
        least: Tensor | None = None
        for params in candidates(x):
            wide = [p[..., None] for p in params]
            codes = encode(x, *wide)
            square = (decode(codes, *wide) - x).square_()
            error = (square if weight is None else square.mul_(weight)).sum(-1)
            if least is None:
                least, best = error, [codes, *params]
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = [
                torch.where(better.view(better.shape + (1,) * (b.dim() - 2)), new, b) for new, b in zip((codes, *params), best, strict=True)
            ]
        blocks.append(best)
    codes, *params = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return codes.view(n, k), *params
