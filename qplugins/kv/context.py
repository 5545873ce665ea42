"""What was cached before a chunk of a prompt, read back from pages as plain keys and values, for an engine's own attention to the chunk's queries.

A chunk attends to its context in slices, so that what is read back at a time is bounded, and slices are joined by their log-sum-exps. On an H100
FlashAttention 3 over what was gathered is several times as fast as the kernel that attends to pages (kernels/attention/prefill.py), which
remains for layers with windows: few of their pages are read, and slices know nothing of windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qplugins.kernels.kv.op import gather
from qplugins.kernels.kv.page import Page

TOKENS = 32768  # of a slice, all sequences together: 134 MB of keys and values at 8 heads of 128


@dataclass
class Slice:
    """A part of every sequence's cached tokens.

    starts int32 [B], cu_lens int32 [B + 1]: where it begins in each, and how many tokens it has of those before; on the device
    total, longest: at most so many tokens together and of one sequence; on the host
    """

    starts: Tensor
    cu_lens: Tensor
    total: int
    longest: int


def slices(context_lens: Tensor, at_most: Tensor, page_size: int) -> list[Slice]:
    """Cached tokens cut into slices of at most TOKENS tokens together, whole pages of each sequence.

    context_lens  int32 [B], on the device, which is not asked       at_most  int32 [B], the same or more, on the host
    """
    share = max(1, TOKENS // (max(1, int((at_most > 0).sum())) * page_size)) * page_size
    found = []
    for start in range(0, int(at_most.max()), share):
        most = (at_most - start).clamp(0, share)
        cu_lens = torch.nn.functional.pad((context_lens - start).clamp(0, share).cumsum(0, dtype=torch.int32), (1, 0))
        found.append(Slice(torch.full_like(context_lens, start), cu_lens, int(most.sum()), int(most.max())))
    return found


def attend(
    attention: Callable[[Tensor, Tensor, Slice], tuple[Tensor, Tensor]],
    pages: Tensor,
    block_table: Tensor,
    parts: list[Slice],
    page: Page,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:
    """out [tokens, heads, D] and lse [tokens, heads] of each slice: what `attention` says of its keys and values [slice.total, kv heads, D], of which
    there are slice.cu_lens."""
    for part in parts:
        k, v = gather(pages, block_table, part.starts, part.cu_lens, part.total, page, dtype)
        yield attention(k, v, part)


def with_sink_logits(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out and lse of a softmax -> out of the softmax that has one more logit a head, whose value is zero."""
    return out * torch.sigmoid(lse - sinks.to(torch.float32))[..., None].to(out.dtype)
