"""Nothing is left to compile for any batch once a layer's kernels have been warmed."""

import random

import pytest
import torch

from qplugins.kernels.attention import decode, merge, prefill
from qplugins.kernels.attention import op as attention
from qplugins.kernels.attention.warm import Calls, batches, query_lens, run, warm
from qplugins.kernels.kv import gather, write
from qplugins.kernels.kv import op as kv
from qplugins.kernels.kv.page import batch_block
from qplugins.kv import get_layout

PAGE = get_layout("int4_sink").page(64, 64)
CALLS = [
    Calls(PAGE, 8, 2, torch.float16, 200, max_query_len=4),
    Calls(PAGE, 8, 8, torch.bfloat16, 3, lse=True, sink_logits=True),
    Calls(get_layout("k8v4_sink").page(80, 64), 4, 4, torch.bfloat16, 33, window=100, soft_cap=True),
]


def test_a_batch_of_every_vector_length():
    assert batches(1) == [1] and batches(32) == [32] and batches(200) == [32, 128, 200] and batches(512) == [32, 128, 512]
    for most in (1, 31, 33, 500, 3000):
        assert {batch_block(n) for n in range(1, most + 1)} == {batch_block(n) for n in batches(most)}


def test_query_tokens_of_every_kind_of_rows():
    assert query_lens(4, 4) == [3, 2, 1]  # 16 rows, 8, and 8 of which half are empty
    for group in (1, 2, 4, 6, 8, 16):
        kinds = lambda lens, group=group: {(decode.rows_of(group, n)[0], decode.half_empty(group, n)) for n in lens}  # noqa: E731
        assert kinds(range(1, 17)) == kinds(query_lens(group, 16))


@pytest.mark.parametrize("calls", CALLS, ids=lambda c: str(c.page))
def test_the_calls_are_valid(calls):
    run(calls, torch.empty(0, dtype=torch.uint8))  # on a CPU, by the reference


def test_on_a_cpu_nothing_runs(monkeypatch):
    monkeypatch.setattr("qplugins.kernels.attention.warm.run", None)
    warm(CALLS[0], torch.empty(0, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("calls", CALLS, ids=lambda c: str(c.page))
def test_no_batch_compiles_afterwards(calls, device):
    kernels = (
        decode.decode_kernel,
        merge.merge_kernel,
        prefill.prefill_kernel,
        gather.gather_kernel,
        write.write_kernel,
        write.write_few_kernel,
    )

    def compiled() -> list[int]:
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]

    page, rng = calls.page, random.Random(0)
    workspace = attention.decode_workspace(calls.max_batch, calls.num_heads, calls.num_kv_heads, page, calls.max_query_len, device)
    warm(calls, workspace)
    before = compiled()
    assert sum(before) >= 5
    for batch in sorted({1, 2, 3, 16, 17, 33, calls.max_batch, *(rng.randint(1, calls.max_batch) for _ in range(6))}):
        batch = min(batch, calls.max_batch)
        for new in (*range(1, calls.max_query_len + 1), 5, 13, 16, 40):
            entries = 3 + batch % 5  # of a row of the block table, which then begins anywhere
            table = torch.zeros(batch + 1, entries, dtype=torch.int32, device=device)[1:]
            starts = (torch.arange(batch + 1) * new).to(torch.int32).to(device)
            lens = torch.full((batch,), 100, dtype=torch.int32, device=device)
            slots = torch.full((batch * new,), -1, device=device)
            pages = torch.zeros(2, calls.num_kv_heads, page.nbytes, dtype=torch.uint8, device=device)
            q = torch.randn(batch * new, calls.num_heads, page.head_dim, dtype=calls.dtype, device=device)
            k, v = (
                torch.randn(batch * new, calls.num_kv_heads, d, dtype=calls.dtype, device=device) for d in (page.head_dim, page.v_head_dim)
            )
            kv.write(pages, k, v, slots, starts, lens, table, page, new)
            scores = dict(scale=0.1, window=calls.window, soft_cap=5.0 if calls.soft_cap else 0.0)
            if new <= calls.max_query_len:
                logits = torch.randn(calls.num_heads, device=device) if calls.sink_logits else None
                lse = torch.empty(q.shape[:2], device=device) if calls.lse else None
                shape = dict(max_query_len=new, max_seq_len=100, lse=lse, sink_logits=logits)
                attention.decode(q, pages, table, lens, starts, workspace, page, **shape, **scores)
            if calls.window:
                attention.prefill(q, pages, table, lens, starts, page, max_query_len=new, **scores)
            else:
                cu_lens = (torch.arange(batch + 1) * 100).to(torch.int32).to(device)
                kv.gather(pages, table, torch.zeros_like(lens), cu_lens, batch * 100, page, calls.dtype)
            lse = torch.zeros(calls.num_heads, batch * new, device=device).T
            out = q.new_zeros(*q.shape[:2], page.v_head_dim)
            attention.merge(out, lse, out, lse)
    assert compiled() == before
