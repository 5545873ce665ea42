"""Cached tokens, read back for an engine's own attention."""

import pytest
import torch
from sequences import Batch, starts

from qplugins.kernels.attention import ref
from qplugins.kernels.kv.page import Page
from qplugins.kv import context


@pytest.mark.parametrize("more", [0, 40])
def test_slices_cover_a_context_once(monkeypatch, more):
    """Also where the host knows no more than that there are at most so many tokens."""
    monkeypatch.setattr(context, "TOKENS", 1024)
    lens = torch.tensor([0, 700, 3000, 129], dtype=torch.int32)
    seen = torch.zeros(4, 3000, dtype=torch.int32)
    for part in context.slices(lens, lens + more * (lens > 0), 128):
        assert int(part.cu_lens[-1]) <= part.total <= 1024
        for b, (start, n) in enumerate(zip(part.starts.tolist(), part.cu_lens.diff().tolist(), strict=True)):
            assert start % 128 == 0 and n <= part.longest
            seen[b, start : start + n] += 1
    assert all((seen[b, :n] == 1).all() and (seen[b, n:] == 0).all() for b, n in enumerate(lens.tolist()))


@pytest.mark.parametrize("more", [0, 70])
def test_attention_to_slices_is_attention_to_pages(monkeypatch, more):
    monkeypatch.setattr(context, "TOKENS", 256)
    batch = Batch.filled(Page.parse("k8v8,d64,p64,s4"), [300, 0, 90], 2)
    q, cu_q = torch.randn(24, 4, 64), starts([9, 5, 10])
    lens = torch.tensor(batch.lens, dtype=torch.int32)

    def attention(k, v, part):
        return ref.varlen(q, k, v, cu_q, part.cu_lens, False, 0.125)

    parts = context.slices(lens, lens + more * (lens > 0), 64)
    assert len(parts) > 1
    (out, lse), *others = context.attend(attention, batch.pages, batch.block_table, parts, batch.page, torch.float32)
    for other in others:
        out, lse = ref.merge(out, lse, *other)
    want, want_lse = ref.prefill(q, batch.pages, batch.block_table, lens, cu_q, batch.page, 0.125)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 7])
def test_varlen_is_attention_of_each_sequence(window):
    q, k, v, cu = torch.randn(20, 4, 64), torch.randn(20, 2, 64), torch.randn(20, 2, 32), starts([13, 0, 7])
    out, lse = ref.varlen(q, k, v, cu, cu, True, 0.125, window, 5.0)
    for a, b in ((0, 13), (13, 20)):
        i = torch.arange(b - a)
        visible = (i[None] <= i[:, None]) & (i[None] > i[:, None] - (window or 99))
        want, want_lse = ref.attend(q[a:b], k[a:b], v[a:b], visible, 0.125, 5.0)
        torch.testing.assert_close(out[a:b], want)
        torch.testing.assert_close(lse[a:b], want_lse)


def test_a_logit_that_sees_nothing_can_be_added_afterwards():
    q, k, v, cu = torch.randn(6, 4, 64), torch.randn(6, 2, 64), torch.randn(6, 2, 64), starts([6])
    logits, visible = torch.randn(4), torch.ones(6, 6, dtype=torch.bool).tril()
    want, _ = ref.attend(q, k, v, visible, 0.125, 0.0, logits)
    torch.testing.assert_close(context.with_sink_logits(*ref.varlen(q, k, v, cu, cu, True, 0.125), logits), want)
