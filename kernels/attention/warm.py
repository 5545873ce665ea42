"""Compiles, before serving, what batches of any make-up will launch: without that each new kind of batch waits seconds for a compiler.

What a kernel is compiled for, beside a layer's own constants, is the length of the vectors that hold a batch (`batch_block`) and the rows that
the query tokens of a sequence take. An engine's own warming up has one batch of prompts at most, and decode steps in CUDA graphs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qplugins.kernels.attention.decode import half_empty, rows_of
from qplugins.kernels.attention.op import decode, merge, prefill
from qplugins.kernels.kv.op import gather, write
from qplugins.kernels.kv.page import Page, batch_block
from qplugins.kernels.kv.ref import MEAN_TOKENS


@dataclass(frozen=True)
class Calls:
    """What an engine asks of a layer's kernels.

    dtype      of queries, keys and values
    max_batch  sequences of a batch, max_query_len tokens of a sequence in decode
    window     of tokens that a query sees, 0 for all
    soft_cap   whether logits are capped, sink_logits whether there are any, lse whether decode gives them
    """

    page: Page
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    max_batch: int
    max_query_len: int = 1
    window: int = 0
    soft_cap: bool = False
    sink_logits: bool = False
    lse: bool = False


_done: set[tuple[Calls, torch.device]] = set()


def warm(calls: Calls, workspace: Tensor) -> None:
    """Compiles them, the first time that it is asked to. Nothing happens on a CPU. workspace: of `decode_workspace`."""
    if workspace.device.type == "cuda" and (calls, workspace.device) not in _done:
        _done.add((calls, workspace.device))
        run(calls, workspace)


def batches(most: int) -> list[int]:
    """Numbers of sequences up to `most`, one for each `batch_block`."""
    found = [min(most, batch_block(1))]
    while found[-1] < most:
        found.append(min(most, batch_block(found[-1] + 1)))
    return found


def query_lens(group: int, most: int) -> list[int]:
    """Numbers of query tokens up to `most`, one for each kind of rows that decode is compiled for."""
    return list({(rows_of(group, n)[0], half_empty(group, n)): n for n in range(most, 0, -1)}.values())


def run(calls: Calls, workspace: Tensor) -> None:
    """Makes a call of each kind, on a batch with one sequence that is not padding."""
    page, device = calls.page, workspace.device
    pages = torch.zeros(1, calls.num_kv_heads, page.nbytes, dtype=torch.uint8, device=device)
    logits = torch.zeros(calls.num_heads, device=device) if calls.sink_logits else None
    scores = dict(scale=1.0, window=calls.window, soft_cap=1.0 if calls.soft_cap else 0.0)

    def empty(tokens: int, heads: int, dim: int) -> Tensor:
        return torch.zeros(tokens, heads, dim, dtype=calls.dtype, device=device)

    def lens(tokens: int, batch: int) -> Tensor:
        return torch.tensor([tokens] + [0] * (batch - 1), dtype=torch.int32, device=device)

    def starts(tokens: int, batch: int) -> Tensor:
        return torch.tensor([0] + [tokens] * batch, dtype=torch.int32, device=device)

    few = query_lens(calls.num_heads // calls.num_kv_heads, calls.max_query_len)
    for batch in batches(calls.max_batch):
        table = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        for n in (1, 2, 4, 8, MEAN_TOKENS - 1, MEAN_TOKENS):
            k, v = empty(n, calls.num_kv_heads, page.head_dim), empty(n, calls.num_kv_heads, page.v_head_dim)
            write(pages, k, v, torch.arange(n, device=device), starts(n, batch), lens(n, batch), table, page, n)
        for n in few:
            q = empty(n, calls.num_heads, page.head_dim)
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device) if calls.lse else None
            shape = dict(max_query_len=n, max_seq_len=page.page_size, lse=lse, sink_logits=logits, **scores)
            decode(q, pages, table, lens(n, batch), starts(n, batch), workspace, page, **shape)
        if not calls.window:
            gather(pages, table, lens(0, batch), starts(page.page_size, batch), page.page_size, page, calls.dtype)
    q = empty(MEAN_TOKENS, calls.num_heads, page.head_dim)
    if calls.window:
        prefill(q, pages, table[:1], lens(page.page_size, 1), starts(MEAN_TOKENS, 1), page, max_query_len=MEAN_TOKENS, **scores)
    out, lse = empty(*q.shape[:2], page.v_head_dim), torch.zeros(q.shape[:2], dtype=torch.float32, device=device)
    merge(out, lse, out, lse)
