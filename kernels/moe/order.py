"""Which rows a program multiplies by which expert: the choices of all tokens, sorted by expert and cut into blocks, without asking the CPU.

A token t makes k choices; choice c = t * k + j is its j-th. A block is up to block_m choices of one expert, which is what one program
multiplies by a piece of that expert's matrix. What describes them has the same size whatever was chosen, as a CUDA graph needs it:

    order   int32 [T * k]      the choices by their experts, and in their own order within one; what no expert here has is left away
    blocks  int32 [3, bound]   block b is order[blocks[1, b] : blocks[2, b]], and its expert blocks[0, b]; nothing where 1 and 2 are equal

How many blocks there can be: n experts with P choices between them have at most (P + n * (block_m - 1)) / block_m; n is at most P and E.

A program has a chunk of choices, and compares them with each other and with all experts, a few at a time: how many before a choice in the
chunk have the same expert, and how many each expert has. What came in the chunks before is a sum of their counts, which a kernel of its own
has left. One chunk, and so one kernel, is enough for decoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch

CHUNK = 256  # choices of a program
ROWS = 16  # choices that are compared at once, and chunks whose counts are loaded at once


def bound(choices: int, experts: int, block_m: int) -> int:
    """The most blocks that so many choices make."""
    return (choices + min(choices, experts) * (block_m - 1)) // block_m


@triton.jit
def _experts_of(ids, c, choices, experts):
    """int32: the experts of choices c, -1 where there is none."""
    e = tl.load(ids + c, mask=c < choices, other=-1)
    return tl.where((e >= 0) & (e < experts), e, -1).to(tl.int32)


@triton.jit
def _count(ids, first, choices, experts, CHUNK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """[BINS]: how many of a chunk's choices each expert has."""
    total = tl.zeros((BINS,), tl.int32)
    for i in range(0, CHUNK, ROWS):
        some = _experts_of(ids, first + i + tl.arange(0, ROWS), choices, experts)
        total += tl.sum((some[:, None] == tl.arange(0, BINS)[None, :]).to(tl.int32), 0)
    return total


@triton.jit(do_not_specialize=["choices", "experts"])
def count_kernel(ids, counts, choices, experts, CHUNK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    """counts[i, e]: how many choices of chunk i expert e has. One program: one chunk."""
    after_previous(PDL)
    chunk = tl.program_id(0)
    total = _count(ids, chunk * CHUNK, choices, experts, CHUNK, BINS, ROWS)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["choices", "experts", "chunks", "block_m", "bound"])
def order_kernel(
    ids, counts, order, blocks, choices, experts, chunks, block_m, bound,
    ONE: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, LOG_BINS: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: where the choices of one chunk go, and as many blocks. ONE: there is but one chunk, and nobody has counted."""
    after_previous(PDL)
    chunk = tl.program_id(0)
    c = chunk * CHUNK + tl.arange(0, CHUNK)
    before = tl.zeros((BINS,), tl.int32)  # choices of an expert in earlier chunks
    if ONE:
        total = _count(ids, 0, choices, experts, CHUNK, BINS, ROWS)
    else:
        total = tl.zeros((BINS,), tl.int32)
        for i in range(0, chunks, ROWS):
            row = i + tl.arange(0, ROWS)[:, None]
            count = tl.load(counts + row * BINS + tl.arange(0, BINS)[None, :], mask=row < chunks, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(row < chunk, count, 0), 0)
    start = tl.cumsum(total, 0) - total  # of an expert's choices in `order`

    chosen = _experts_of(ids, c, choices, experts)
    earlier = tl.zeros((CHUNK,), tl.int32)  # in this chunk
    for i in range(0, CHUNK, ROWS):
        other = chunk * CHUNK + i + tl.arange(0, ROWS)
        same = chosen[:, None] == _experts_of(ids, other, choices, experts)[None, :]
        earlier += tl.sum((same & (other[None, :] < c[:, None])).to(tl.int32), 1)
    tl.store(order + tl.gather(start + before, tl.maximum(chosen, 0), 0) + earlier, c, mask=chosen >= 0)

    height = (total + block_m - 1) // block_m  # in blocks
    end = tl.cumsum(height, 0)
    owner = tl.zeros((CHUNK,), tl.int32)  # of block c: the first expert whose blocks end after it, by bisection
    for i in tl.static_range(LOG_BINS):
        owner += tl.where(tl.gather(end, owner + ((BINS >> (i + 1)) - 1), 0) <= c, BINS >> (i + 1), 0)
    first = tl.gather(start - (end - height) * block_m, owner, 0) + c * block_m
    stop = tl.minimum(first + block_m, tl.gather(start + total, owner, 0))
    stop = tl.where(c < tl.sum(height, 0), stop, first)
    inside = c < bound
    tl.store(blocks + c, owner, mask=inside)
    tl.store(blocks + bound + c, first, mask=inside)
    tl.store(blocks + 2 * bound + c, stop, mask=inside)


def order(topk_ids: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """(order, blocks) of the choices topk_ids, int32 or int64 [T, k] and contiguous, among so many experts. T * k > 0."""
    choices, limit = topk_ids.numel(), bound(topk_ids.numel(), experts, block_m)
    order = torch.empty(choices, dtype=torch.int32, device=topk_ids.device)
    blocks = torch.empty(3, limit, dtype=torch.int32, device=topk_ids.device)
    chunk, bins = min(CHUNK, max(ROWS, triton.next_power_of_2(choices))), max(ROWS, triton.next_power_of_2(experts))
    chunks = triton.cdiv(choices, chunk)
    counts = order
    if chunks > 1:
        counts = torch.empty(chunks, bins, dtype=torch.int32, device=topk_ids.device)
        count_kernel[(chunks,)](topk_ids, counts, choices, experts, CHUNK=chunk, BINS=bins, ROWS=ROWS, **dependent_launch())
    order_kernel[(chunks,)](
        topk_ids, counts, order, blocks, choices, experts, chunks, block_m, limit,
        ONE=chunks == 1, CHUNK=chunk, BINS=bins, LOG_BINS=bins.bit_length() - 1, ROWS=ROWS, **dependent_launch(),
    )  # fmt: skip
    return order, blocks
